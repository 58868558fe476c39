"""What a drop-in scheduler holds on to, and what a step asks for: the state, the history and one output."""

from collections.abc import Iterator

import pytest
import torch
from drop_in import made, network
from torch import Tensor

import fastdiff.integrations.diffusers as drop_in
from fastdiff.integrations.diffusers.scheduler import Scheduler

SHAPE = (1, 4, 64, 64)
# Tensors of the sample's size that a class keeps between steps, with its own defaults; the others keep none.
KEPT = {
    "DPMSolverMultistepScheduler": 1,
    "DPMSolverMultistepInverseScheduler": 1,
    "DPMSolverSinglestepScheduler": 2,
    "DPMSolverSDEScheduler": 2,
    "EDMDPMSolverMultistepScheduler": 1,
    "UniPCMultistepScheduler": 3,
    "DEISMultistepScheduler": 1,
    "SASolverScheduler": 3,
    "HeunDiscreteScheduler": 2,
    "KDPM2DiscreteScheduler": 2,
    "KDPM2AncestralDiscreteScheduler": 2,
    "FlowMatchHeunDiscreteScheduler": 2,
    # As many as its public lists have: four slopes; four noise predictions, and the state that PNDM's start from.
    "LMSDiscreteScheduler": 4,
    "PNDMScheduler": 5,
    "IPNDMScheduler": 4,
}
CLASSES = [
    name
    for name, value in vars(drop_in).items()
    if isinstance(value, type) and issubclass(value, Scheduler) and hasattr(value, "step")
]
IMAGE = torch.zeros(SHAPE)


def held(value: object, seen: set[int]) -> Iterator[Tensor]:
    """Tensors of the sample's size reachable from an object's attributes."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        if value.numel() == torch.Size(SHAPE).numel():
            yield value
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from held(item, seen)
    elif isinstance(value, dict):
        yield from held(list(value.values()), seen)
    elif hasattr(value, "__dict__"):
        yield from held(vars(value), seen)


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_held_between_steps(name):
    scheduler = made(drop_in, name)
    scheduler.set_timesteps(10)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    image = {"original_image": IMAGE, "mask": IMAGE} if name == "RePaintScheduler" else {}
    for t in scheduler.timesteps[:7]:
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(inputs, t), t, x, **image, return_dict=False)[0]
        storages = {tensor.untyped_storage()._cdata for tensor in held(scheduler, set())}
        assert len(storages) <= KEPT.get(name, 0)


# Tensors that a step makes, in float32 and besides noise: the state, and the history or the data prediction it gives.
MADE = {
    "DPMSolverMultistepScheduler": 2,
    "UniPCMultistepScheduler": 3,
    "DEISMultistepScheduler": 2,
    "EulerDiscreteScheduler": 2,
    "DDIMScheduler": 2,
    "FlowMatchEulerDiscreteScheduler": 1,
    "FlowMatchHeunDiscreteScheduler": 1,
    "HeunDiscreteScheduler": 3,
    "KDPM2DiscreteScheduler": 2,
}


@pytest.mark.parametrize("name", MADE)
def test_what_a_step_asks_for(name):
    scheduler = getattr(drop_in, name)()
    scheduler.set_timesteps(10)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for index, t in enumerate(scheduler.timesteps[:5]):
        inputs = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = network(inputs, t)
        with torch.autograd.profiler.profile(profile_memory=True) as profile:
            result = scheduler.step(output, t, x, return_dict=False)
        asked = sum(max(event.self_cpu_memory_usage, 0) for event in profile.function_events)
        x = result[0]
        if index:  # the first step brings the table along
            assert asked <= (MADE[name] + 0.01) * x.numel() * x.element_size()
