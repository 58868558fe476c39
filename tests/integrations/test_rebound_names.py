"""What a drop-in class leaves to diffusers' own class works where diffusers' name for that one is ours by now."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from drop_in import SHAPE, pair, relative
from torch import Tensor

import fastdiff
import fastdiff.integrations.diffusers as drop_in

NAMES = [name for name in drop_in.__all__ if hasattr(getattr(drop_in, name), "step")]


def broadcast_step(scheduler: Any) -> Tensor | type[Exception]:
    """A step with an output that broadcasts, which no row takes."""
    scheduler.set_timesteps(10)
    t = scheduler.timesteps[2]
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    takes = inspect.signature(scheduler.step).parameters
    torch.manual_seed(1)
    given: dict[str, Any] = {"generator": torch.Generator().manual_seed(1)} if "generator" in takes else {}
    if "original_image" in takes:
        given |= {"original_image": torch.ones(SHAPE), "mask": torch.ones(SHAPE)}
    try:
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        return scheduler.step(0.5 * x[:, :1], t, x, **given).prev_sample
    except Exception as error:  # whatever it is, ours has to be of that type
        return type(error)


@pytest.mark.parametrize("name", NAMES)
def test_fallback(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(name)
    monkeypatch.setattr(diffusers, name, type(ours))
    our, their = broadcast_step(ours), broadcast_step(theirs)
    if isinstance(their, Tensor):
        assert isinstance(our, Tensor), our
        assert relative(our, their) < 1e-6
    else:
        assert our is their


def test_undoing_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair("RePaintScheduler")
    monkeypatch.setattr(diffusers, "RePaintScheduler", type(ours))
    undone = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        x = torch.ones(SHAPE, dtype=torch.float64)
        undone.append(scheduler.undo_step(x, scheduler.timesteps[2], torch.Generator().manual_seed(1)))
    assert relative(*undone) < 1e-6


def test_unpatching(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair("DDIMScheduler")
    monkeypatch.setattr(diffusers, "DDIMScheduler", type(ours))
    pipe = SimpleNamespace(scheduler=ours)
    fastdiff.unpatch_scheduler(pipe, strict=True)
    assert type(pipe.scheduler) is type(theirs)
