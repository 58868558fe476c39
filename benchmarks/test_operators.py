"""The quick cases under pytest-benchmark: `python -m pytest benchmarks`; nothing is asserted about speed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import cases, operators
from benchmarks.cases import Case

CASES = cases.select(None, quick=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("whose", ["baseline", "fastdiff"])
def test_speed(benchmark: Any, case: Case, whose: str) -> None:
    work = operators.BUILDERS[case.operator](case, torch.device("cpu"))
    benchmark.group = case.name
    with torch.inference_mode():
        benchmark(work.ours if whose == "fastdiff" else next(iter(work.peers.values())))
