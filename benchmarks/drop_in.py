"""A drop-in scheduler's step, through its public interface, against diffusers' own step of the same class."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import fastdiff
from benchmarks.cases import Case
from benchmarks.work import AUTOMATIC, Work
from fastdiff import ops

STEPS, INDEX = 20, 10
LONGEST_HISTORY = 5
"""Calls of the same step after which it reads nothing but what such calls left."""
LATENT_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class Kind:
    """A class and its configuration. method: the one that takes a step; further: what it is given besides sample,
    output and timestep; history: how many states besides x a step reads; calls: how many calls make a step of the
    solver; data: whether the data prediction is given too; pinned: attributes that have to be set back for a call to
    be the same step again."""

    scheduler: str
    config: dict[str, Any] = field(default_factory=lambda: dict(LATENT_BETAS))
    method: str = "step"
    further: Callable[[Any, int, Tensor], dict[str, Any]] = lambda scheduler, index, x: {}
    history: int = 0
    calls: int = 1
    data: bool = False
    pinned: tuple[str, ...] = ()


def _before(scheduler: Any, index: int, x: Tensor) -> dict[str, Any]:
    return {"prev_timestep": scheduler.timesteps[index + 1]}


def _half_known(scheduler: Any, index: int, x: Tensor) -> dict[str, Any]:
    mask = torch.zeros_like(x[:1, :1])
    mask[..., : x.shape[-1] // 2] = 1.0
    return {"original_image": x.flip(0, 1), "mask": mask}


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
    "unipc": Kind("UniPCMultistepScheduler", history=2, pinned=("last_sample",)),
    "deis": Kind("DEISMultistepScheduler", history=1),
    "ddim_inverse": Kind("DDIMInverseScheduler", {**LATENT_BETAS, "clip_sample": False}, data=True),
    "kdpm2": Kind("KDPM2DiscreteScheduler", calls=2, data=True),
    "kdpm2_ancestral": Kind("KDPM2AncestralDiscreteScheduler", calls=2, data=True),
    "dpm_sde": Kind("DPMSolverSDEScheduler", {**LATENT_BETAS, "noise_sampler_seed": 0}, calls=2, data=True),
    "dpmpp_2s": Kind("DPMSolverSinglestepScheduler", history=1, calls=2),
    "dpmpp_2m_inverse": Kind("DPMSolverMultistepInverseScheduler", history=1),
    "sa_solver": Kind("SASolverScheduler", history=2, pinned=("last_sample", "last_noise")),
    "lcm": Kind("LCMScheduler", data=True),
    "tcd": Kind("TCDScheduler", data=True),
    "consistency": Kind("CMStochasticIterativeScheduler", {}),
    "flow_heun": Kind("FlowMatchHeunDiscreteScheduler", {}, calls=2),
    "edm_euler": Kind("EDMEulerScheduler", {}, data=True),
    "edm_dpmpp_2m": Kind("EDMDPMSolverMultistepScheduler", {}, history=1),
    "unclip": Kind("UnCLIPScheduler", {}, further=_before, data=True),
    "repaint": Kind("RePaintScheduler", {"clip_sample": False}, further=_half_known, data=True),
    "score_sde_predict": Kind("ScoreSdeVeScheduler", {}, method="step_pred", data=True),
    "score_sde_correct": Kind("ScoreSdeVeScheduler", {}, method="step_correct"),
}


def build(case: Case, device: torch.device) -> Work:
    import diffusers

    from fastdiff.integrations import diffusers as drop_in

    kind, dtype = KINDS[case.variant], getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(case.shape, generator=generator).to(device, dtype) for _ in range(2 * (INDEX + 2))]
    theirs = _step(getattr(diffusers, kind.scheduler), kind, states)
    ours = _step(getattr(drop_in, kind.scheduler), kind, states)
    draw = ops.torch_normal

    def widened(shape: torch.Size, *, generator: torch.Generator, dtype: torch.dtype, device: Any = "cpu") -> Tensor:
        return draw(shape, generator=generator, dtype=states[0].dtype).to(dtype)

    # In float64, but with the noise that the others draw.
    with mock.patch.object(ops, "torch_normal", widened), fastdiff.use_backend("reference"):
        truth = _step(getattr(drop_in, kind.scheduler), kind, [state.double() for state in states])()
    elements = states[0].numel()
    read = 2 + kind.history
    written = 1 + min(kind.history, 1) + kind.data
    return Work(
        peers={"diffusers": theirs},
        ours=ours,
        truth=truth,
        plain=theirs(),
        traffic=kind.calls * elements * ((read + written) * states[0].element_size()),
        steps=1,
        backends=(AUTOMATIC,),
    )


def _step(scheduler_class: Any, kind: Kind, states: list[Tensor]) -> Callable[[], Tensor]:
    """A call that takes the same step in the middle of a run again and again; the steps before it were taken once."""
    scheduler = scheduler_class(**kind.config)
    scheduler.set_timesteps(STEPS)
    if hasattr(scheduler, "set_sigmas"):
        scheduler.set_sigmas(STEPS)
    step = getattr(scheduler, kind.method)
    taken = inspect.signature(step).parameters
    generator = torch.Generator(states[0].device)
    given = {"generator": generator} if "generator" in taken else {}
    first = INDEX - INDEX % kind.calls
    calls = []
    for index, (t, x, m) in enumerate(zip(scheduler.timesteps, states[::2], states[1::2], strict=False)):
        arguments = (m, t, x) if "timestep" in taken else (m, x)
        further = given | kind.further(scheduler, index, x)
        calls.append(functools.partial(step, *arguments, return_dict=False, **further))
    if hasattr(scheduler, "is_scale_input_called"):
        scheduler.scale_model_input(states[0], scheduler.timesteps[0])
    for before in calls[:first]:
        before()

    indexed = hasattr(scheduler, "_step_index")
    pinned = {name: getattr(scheduler, name) for name in kind.pinned}
    draws = False
    repeated = calls[first : first + kind.calls]

    def call() -> Tensor:
        if indexed:
            scheduler._step_index = first
        for name, value in pinned.items():
            setattr(scheduler, name, value)
        if draws:
            generator.manual_seed(0)
        for one in repeated:
            result: Tensor = one()[0]
        return result

    untouched = generator.get_state()
    for _ in range(LONGEST_HISTORY):
        call()
    draws = not torch.equal(generator.get_state(), untouched)
    return call
