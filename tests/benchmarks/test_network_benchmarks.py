"""Accelerated networks as benchmark cases: one for each rewrite, on a network that it changes, all of them right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import accelerated, cases, compilers, plot, run, table
from benchmarks.cases import Case
from benchmarks.count import Cost, count
from benchmarks.work import Work
from fastdiff.models.rewrites import names

CPU = torch.device("cpu")
REWRITES = [case for case in cases.CASES if case.operator == "rewrite" and case.dtype == "float32"]
UNSEEN = ("arena", "prepacked", "winograd")
"""Rewrites that change where tensors lie, or how products are made, and not which operators are called."""


def small(case: Case) -> Case:
    """The case with pictures of 8 x 8, or of as many patches."""
    side = 16 if "dit" in case.variant else 8
    return dataclasses.replace(case, shape=(*case.shape[:2], side, side))


def built(case: Case) -> tuple[Work, set[str], int]:
    """The work, its contenders that are right, and how many are wrong."""
    with torch.no_grad():
        work = accelerated.build(case, CPU)
        admitted, _, red = run._admitted(case, work, CPU)
    return work, {contender.name for contender in admitted}, red


def settled(call: Callable[[], Tensor]) -> Cost:
    with torch.no_grad():
        call()
        call()
    return count(call).total


@pytest.mark.parametrize("case", REWRITES, ids=lambda case: case.variant)
def test_each_rewrite_is_measured_where_it_changes_something(case: Case) -> None:
    work, admitted, red = built(small(case))
    assert red == 0
    assert admitted == {"without", "none", "only", "fastdiff automatic"}
    if not case.variant.startswith(UNSEEN):
        assert settled(work.ours) != settled(work.peers["without"])


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_every_rewrite_has_a_row(dtype: str) -> None:
    measured = [
        case.variant.rpartition("-")[0] for case in cases.CASES if (case.operator, case.dtype) == ("rewrite", dtype)
    ]
    assert measured == list(names())


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize(("network", "shape"), [("tiny_unet", (2, 3, 8, 8)), ("small_decoder", (1, 4, 8, 8))])
def test_a_network_is_accelerated(
    network: str, shape: tuple[int, ...], dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilers, "has_openvino", lambda: False)
    work, admitted, red = built(Case("network", network, shape, dtype))
    assert red == 0
    wide = {"diffusers float32"} if dtype == "bfloat16" else set()
    assert admitted == {"diffusers", "diffusers channels-last", "fastdiff automatic"} | wide
    assert settled(work.ours).launches < settled(work.peers["diffusers"]).launches
    assert work.flops == settled(work.peers["diffusers"]).flops > 0


def test_the_networks_are_those_that_their_names_say() -> None:
    import diffusers

    sizes = {"cifar": 35.7, "sd15": 859.5, "decoder": 83.7}
    for name, millions in sizes.items():
        layout = accelerated.NETWORKS[name]
        with torch.device("meta"):
            network = getattr(diffusers, layout.kind)(**layout.config)
        assert round(sum(p.numel() for p in network.parameters()) / 1e6, 1) == millions
    assert {name for name, _ in cases.NETWORKS} == set(sizes)


def rows(operator: str, variant: str, times: dict[str, float]) -> list[dict[str, str]]:
    first = next(iter(times.values()))
    common: dict[str, Any] = {"case": f"{operator}/{variant}", "operator": operator, "variant": variant}
    common |= {"shape": "1x2", "dtype": "float32", "roofline_share": "0.5", "device": "cpu", "hardware": "x"}
    common |= {"relative_error": "1e-06"}
    common |= dict.fromkeys(("threads", "cpu_capability", "torch", "diffusers", "python", "date"), "1")
    return [
        {
            **common,
            "contender": who,
            "chosen": "yes" if "fastdiff" in who else "no",
            "p50_us": str(t),
            "speedup": str(first / t),
        }
        for who, t in times.items()
    ]


def test_networks_and_rewrites_have_tables_and_panels_of_their_own(tmp_path: Any) -> None:
    of_operator = rows("geglu", "exact", {"pytorch": 6.0, "fastdiff native": 2.0})
    of_network = rows("network", "n", {"diffusers": 6e3, "diffusers channels-last": 5e3, "fastdiff automatic": 4e3})
    times = {"without": 30.0, "none": 50.0, "only": 40.0, "fastdiff automatic": 20.0}
    of_rewrite = rows("rewrite", "qkv-net", times)
    lines = table.markdown(of_operator + of_network + of_rewrite).splitlines()
    assert "| `geglu` exact | 1x2 | float32 | pytorch | 6 us | 2 us | 3.0 | 50% |" in lines
    assert "| `n` | 1x2 | float32 | 6 ms | 5 ms |  |  | 4 ms | 1.50 | 1.50 |  |  | 1e-06 (1e-06) | 50% |" in lines
    assert "| `qkv` | net | 1x2 | float32 | 30 us | 20 us | 1.50 | 1.25 |" in lines
    assert sum(line.startswith("|---") for line in lines) == 3
    assert "| `qkv` | net | 1x2 | float32 | 30 us | 20 us | 1.50 |  |" in table.markdown(
        [*of_rewrite[:2], of_rewrite[3]]
    )
    shown = [
        len(plot._shown(panel, of_operator + of_network + of_rewrite)) for column in plot.COLUMNS for panel in column
    ]
    assert shown == [2, 0, 3, 0, 4]
    plot.plot(of_network + of_rewrite, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
