"""Pipelines with networks that fastdiff has none of its own for, or with calls that few others make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drop_in import relative
from rare_pipelines import RARE
from tiny_pipelines import images
from torch import nn

import fastdiff
from fastdiff.errors import InputError
from fastdiff.models.forward import forward


@pytest.mark.filterwarnings("ignore:fastdiff. .*runs as before:UserWarning")
@pytest.mark.parametrize(("build", "arguments", "left"), RARE.values(), ids=RARE)
def test_a_rare_pipeline(build: Callable[[], Any], arguments: dict[str, Any], left: set[str]) -> None:
    pipe = build()
    expected = images(pipe, **arguments)
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    fastdiff.report(reset=True)
    if left:
        with pytest.raises(InputError, match=r"strict=True, and .*fastdiff has no network for"):
            fastdiff.accelerate(pipe, strict=True)
        assert all(forward(inner) is None for network in networks for inner in network.modules())
    fastdiff.accelerate(pipe, strict=not left)
    assert relative(torch.tensor(images(pipe, **arguments)), torch.tensor(expected)) < 1e-5
    report = fastdiff.report(reset=True)
    assert {reason.split(";")[0] for _, reason in report.left} == {
        f"fastdiff has no network for {kind}" for kind in left
    }
    assert any(name == "attention" for name, _ in report.calls)
    fastdiff.restore(pipe)
    assert np.array_equal(images(pipe, **arguments), expected)
