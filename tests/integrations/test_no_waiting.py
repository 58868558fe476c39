"""No step waits for a device: nothing is read of any tensor once the timesteps are set."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import diffusers
import pytest
import torch
from drop_in import made, relative
from torch import Tensor
from waiting import OnDevice, Waited, nothing_is_read, on_device, the_device_is_not_read

import fastdiff.integrations.diffusers as drop_in

STEPS = 4
SHAPE = (2, 3, 8, 8)
NAMES = [name for name in drop_in.__all__ if name.endswith("Scheduler")]
LEVELS_ON_DEVICE = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
CONFIGS: dict[str, tuple[dict[str, Any], ...]] = {
    "CMStochasticIterativeScheduler": ({"clip_denoised": False},),
    "DDIMScheduler": ({"clip_sample": False}, {"thresholding": True}, {"prediction_type": "v_prediction"}),
    "DDPMScheduler": ({"variance_type": "fixed_large"}, {"thresholding": True}),
    "DPMSolverMultistepScheduler": (
        {"algorithm_type": "sde-dpmsolver++"},
        {"solver_order": 3},
        {"thresholding": True},
        {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
    ),
    "EulerDiscreteScheduler": ({"prediction_type": "v_prediction"}, {"use_karras_sigmas": True}),
    "FlowMatchEulerDiscreteScheduler": ({"stochastic_sampling": True}, {"invert_sigmas": True}),
    "LCMScheduler": ({"clip_sample": True},),
    "PNDMScheduler": ({"skip_prk_steps": True},),
    "UniPCMultistepScheduler": ({"solver_order": 3},),
}
CASES = [(name, config) for name in NAMES for config in ({}, *CONFIGS.get(name, ()))]
cases = pytest.mark.parametrize(("name", "config"), CASES, ids=str)
# torchsde seeds its noise on its device, and compares times on the host.
BROWNIAN = ("DPMSolverSDEScheduler",)
WATCHES = {"the device": the_device_is_not_read, "anything": nothing_is_read}


def ready(scheduler: Any, begin: bool = False) -> Any:
    """With timesteps, and levels where its class keeps them there, on the device."""
    scheduler.set_timesteps(STEPS)
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(STEPS)
    scheduler.timesteps = on_device(scheduler.timesteps)
    if type(scheduler).__name__ in LEVELS_ON_DEVICE:
        scheduler.sigmas = on_device(scheduler.sigmas)
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler


def states(scheduler: Any, x: Tensor, watch: Any = nullcontext, times: Any = None) -> Iterator[Tensor]:
    """The state after each call of a step, from the same x and network output each time."""
    times = list(scheduler.timesteps if times is None else times)
    for t, following in zip(times, [*times[1:], None], strict=True):
        m = 0.3 * x
        with watch():
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(x, t)
            if not hasattr(scheduler, "step"):
                yield from _score_steps(scheduler, m, t, x)
                continue
            result = scheduler.step(**_arguments(scheduler.step, m, t, following, x))
        yield result.prev_sample if hasattr(result, "prev_sample") else result[0]


def _score_steps(scheduler: Any, m: Tensor, t: Tensor, x: Tensor) -> Iterator[Tensor]:
    yield scheduler.step_correct(m, x).prev_sample
    yield scheduler.step_pred(m, t, x).prev_sample


def _arguments(step: Any, m: Tensor, t: Tensor, following: Tensor | None, x: Tensor) -> dict[str, Any]:
    """What the steps of all classes are given; the rest of their arguments have defaults."""
    known = {"model_output": m, "timestep": t, "sample": x, "original_image": 0.5 * x, "mask": torch.ones_like(x)}
    known |= {"old_pred_original_sample": None, "timestep_back": following}
    return {name: known[name] for name in inspect.signature(step).parameters if name in known}


@cases
@pytest.mark.parametrize("begin", [False, True], ids=["", "set_begin_index"])
@pytest.mark.parametrize("watch", WATCHES.values(), ids=WATCHES)
def test_no_step_waits(name, config, begin, watch):
    if name in BROWNIAN:
        watch = the_device_is_not_read
    x = torch.randn(SHAPE)
    torch.manual_seed(0)
    expected = list(states(ready(made(drop_in, name, config), begin), x))
    torch.manual_seed(0)
    found = list(states(ready(made(drop_in, name, config), begin), on_device(x), watch))
    assert len(found) == len(expected) >= STEPS
    for ours, plain in zip(found, expected, strict=True):
        assert isinstance(ours, OnDevice)
        assert relative(ours.as_subclass(Tensor), plain.as_subclass(Tensor)) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_theirs_waits(name):
    """So the watch sees what there is to see: a timestep that is looked up."""
    with pytest.raises(Waited):
        list(states(ready(made(diffusers, name)), on_device(torch.randn(SHAPE)), the_device_is_not_read))


@pytest.mark.parametrize(("name", "config"), [case for case in CASES if case[0] not in BROWNIAN], ids=str)
def test_steps_without_values(name, config):
    """Meta tensors have none to read."""
    scheduler = made(drop_in, name, config)
    scheduler.set_timesteps(STEPS)
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(STEPS)
    found = list(states(scheduler, torch.empty(SHAPE, device="meta")))
    assert all(state.is_meta and state.shape == SHAPE for state in found)


READS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "bool": lambda x: bool(x[0] > 0.0),
    "if": lambda x: 1 if x[0] > 0.0 else 0,
    "chained comparison": lambda x: 0.0 <= x[0] <= 1.0,
    "float": lambda x: float(x[0]),
    "int": lambda x: range(x[0].long()),
    "max of two": lambda x: max(x[0], x[1]),
    "nonzero": lambda x: (x == 0.0).nonzero(),
    "where": lambda x: torch.where(x > 0.0),
    "mask": lambda x: x[x > 0.0],
    "index elsewhere": lambda x: torch.zeros(9)[x.long()],
    "cpu": lambda x: x.cpu(),
    "to": lambda x: x.to("cpu"),
    "to device": lambda x: x.to(device="cpu"),
    "print": lambda x: f"{x}",
}


@pytest.mark.parametrize("watch", WATCHES.values(), ids=WATCHES)
@pytest.mark.parametrize("read", READS)
def test_the_watch(read, watch):
    x = on_device(torch.arange(3.0))
    READS[read](x)
    with pytest.raises(Waited), watch():
        READS[read](x)


@pytest.mark.parametrize("read", ["item", "bool", "if", "float", "max of two", "nonzero", "where", "mask"])
def test_the_watch_over_everything(read):
    x = torch.arange(3.0)
    with the_device_is_not_read():
        READS[read](x)
    with pytest.raises(Waited), nothing_is_read():
        READS[read](x)
