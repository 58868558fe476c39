"""A drop-in scheduler's step, through its public interface, against diffusers' own step of the same class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.work import AUTOMATIC, Work

STEPS, INDEX = 20, 10
LATENT_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SMALL_RATIOS = {"flow": {}, "latent": LATENT_BETAS}


@dataclass(frozen=True)
class Kind:
    """A class and its configuration; history: how many states besides x it reads and writes in a step; calls: how many
    calls make a step of the solver; data: whether the data prediction is given too."""

    scheduler: str
    config: dict[str, Any] = field(default_factory=lambda: dict(LATENT_BETAS))
    history: int = 0
    calls: int = 1
    data: bool = False


KINDS = {
    "ddim": Kind("DDIMScheduler", {**LATENT_BETAS, "clip_sample": False}, data=True),
    "ddpm": Kind("DDPMScheduler", {**LATENT_BETAS, "clip_sample": False}, data=True),
    "euler": Kind("EulerDiscreteScheduler", data=True),
    "euler_ancestral": Kind("EulerAncestralDiscreteScheduler", data=True),
    "flow_euler": Kind("FlowMatchEulerDiscreteScheduler", {}),
    "heun": Kind("HeunDiscreteScheduler", calls=2, data=True),
    "lms": Kind("LMSDiscreteScheduler", history=3, data=True),
    "pndm": Kind("PNDMScheduler", {**LATENT_BETAS, "skip_prk_steps": True}, history=3),
    "ipndm": Kind("IPNDMScheduler", {}, history=3),
    "dpmpp_2m": Kind("DPMSolverMultistepScheduler", history=1),
    "dpmpp_3m": Kind("DPMSolverMultistepScheduler", {**LATENT_BETAS, "solver_order": 3}, history=2),
    "unipc": Kind("UniPCMultistepScheduler", history=2),
    "deis": Kind("DEISMultistepScheduler", history=1),
}


def build(case: Case, device: torch.device) -> Work | None:
    """None where diffusers is not installed."""
    if find_spec("diffusers") is None:
        return None
    import diffusers

    from fastdiff.integrations import diffusers as drop_in

    kind, dtype = KINDS[case.variant], getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(case.shape, generator=generator).to(device, dtype) for _ in range(2 * (INDEX + 2))]
    theirs = _step(getattr(diffusers, kind.scheduler), kind, states)
    ours = _step(getattr(drop_in, kind.scheduler), kind, states)
    exact = _step(getattr(drop_in, kind.scheduler), kind, [state.double() for state in states])
    elements = states[0].numel()
    read = 2 + kind.history
    written = 1 + min(kind.history, 1)
    return Work(
        peers={"diffusers": theirs},
        ours=ours,
        truth=exact(),
        plain=theirs(),
        traffic=kind.calls * elements * ((read + written) * states[0].element_size()),
        steps=1,
        backends=(AUTOMATIC, "native", "triton", "reference"),
    )


def _step(scheduler_class: Any, kind: Kind, states: list[Tensor]) -> Callable[[], Tensor]:
    """A call that takes the same step in the middle of a run again and again; the steps before it were taken once."""
    scheduler = scheduler_class(**kind.config)
    scheduler.set_timesteps(STEPS)
    times = list(scheduler.timesteps)
    pairs = list(zip(states[::2], states[1::2], strict=True))
    indexed = hasattr(scheduler, "_step_index")
    if hasattr(scheduler, "is_scale_input_called"):
        scheduler.scale_model_input(states[0], times[0])
    first = INDEX - INDEX % kind.calls
    for index in range(first):
        torch.manual_seed(index)
        scheduler.step(pairs[index][1], times[index], pairs[index][0], return_dict=False)

    def call() -> Tensor:
        if indexed:
            scheduler._step_index = first
        for index in range(first, first + kind.calls):
            x, m = pairs[index]
            result: Tensor = scheduler.step(m, times[index], x, return_dict=False)[0]
        return result

    return call
