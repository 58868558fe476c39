"""Whole pipelines of diffusers: what they draw with a scheduler of theirs, and after it was patched."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
from drop_in import relative
from tiny_pipelines import draw, make

import fastdiff
import fastdiff.integrations.diffusers as drop_in

EXPORTED = [name for name in drop_in.__all__ if name != "SchedulerMixin"]
STEPS = 5
SAME = 1e-4
"""Five steps of parity (1e-5 each), seen through a network twice as large as they are."""
STABLE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "clip_sample": False,
}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
ELSEWHERE = {"RePaintScheduler", "ScoreSdeVeScheduler", "UnCLIPScheduler"}
"""Those that Stable Diffusion's loop cannot use, besides flow matching."""
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    f"{kind}-{name}": (kind, f"{name}Scheduler", {}, {})
    for kind, names in {
        "DDPM": ("DDPM", "DDIM", "UnCLIP", "EulerAncestralDiscrete", "TCD", "SASolver"),
        "consistency": ("CMStochasticIterative",),
        "SD img2img": ("DDIM", "DPMSolverMultistep", "HeunDiscrete", "UniPCMultistep", "LCM", "EulerAncestralDiscrete"),
        "SD inpaint": ("DDIM", "PNDM", "EulerDiscrete", "DPMSolverMultistep", "KDPM2Discrete"),
        "ControlNet": ("DDPM", "UniPCMultistep", "DPMSolverMultistep", "DEISMultistep"),
        "SDXL": ("EulerDiscrete", "DPMSolverMultistep", "EDMEuler", "EDMDPMSolverMultistep", "DPMSolverSDE", "LCM"),
        "DiT": ("DDIM", "DDPM", "PNDM", "DPMSolverMultistep", "LMSDiscrete"),
        "SD3": ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete"),
        "Flux": ("FlowMatchEulerDiscrete",),
        "score SDE": ("ScoreSdeVe",),
        "RePaint": ("RePaint",),
    }.items()
    for name in names
} | {
    "SD-eta": ("SD", "DDIMScheduler", {}, {"eta": 0.7}),
    "SD-timesteps": ("SD", "DPMSolverMultistepScheduler", {}, {"timesteps": [990, 700, 400, 150, 30]}),
    "SD-sigmas": ("SD", "EulerDiscreteScheduler", {}, {"sigmas": [14.0, 6.0, 2.0, 0.5, 0.1, 0.0]}),
    "SD-Karras SDE": (
        "SD",
        "DPMSolverMultistepScheduler",
        {"use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
        {},
    ),
    "SDXL-stopped early": ("SDXL", "DPMSolverMultistepScheduler", {}, {"denoising_end": 0.6}),
    "SD3-flow sigmas": ("SD3", "DPMSolverMultistepScheduler", {**FLOW, "flow_shift": 3.0}, {}),
    "SD3-UniPC": ("SD3", "UniPCMultistepScheduler", {**FLOW, "flow_shift": 3.0}, {}),
    "Flux-dynamic shift": ("Flux", "FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}, {}),
}
CASES |= {
    f"SD-{name.removesuffix('Scheduler')}": ("SD", name, {}, {})
    for name in EXPORTED
    if not name.startswith("Flow") and name not in ELSEWHERE
}


@pytest.mark.parametrize(("kind", "name", "config", "arguments"), CASES.values(), ids=CASES)
def test_a_patched_pipeline_draws_the_same(
    kind: str, name: str, config: dict[str, Any], arguments: dict[str, Any]
) -> None:
    theirs = getattr(diffusers, name)
    keys = inspect.signature(theirs.__init__).parameters
    stable = {} if kind in ("DDPM", "consistency", "RePaint") else {key: STABLE[key] for key in STABLE if key in keys}
    pipe = make(kind, theirs(**{**stable, **config}))
    images, inputs = draw(kind, pipe, STEPS, **arguments)
    assert images.std() > 0.05, "a picture"
    fastdiff.patch_scheduler(pipe, strict=True)
    assert type(pipe.scheduler) is getattr(drop_in, name)
    our_images, our_inputs = draw(kind, pipe, STEPS, **arguments)
    np.testing.assert_allclose(our_images, images, rtol=0.0, atol=SAME)
    for call, (our, their) in enumerate(zip(our_inputs, inputs, strict=True)):
        assert relative(our, their) < SAME, f"call {call} of the network"
