"""add_noise and get_velocity against diffusers."""

from itertools import product

import pytest
import torch
from drop_in import network, pair, relative
from waiting import on_device, the_device_is_not_read

import fastdiff.integrations.diffusers as drop_in
from fastdiff.integrations.diffusers.alphas_cumprod import Noising, Velocity

CLASSES = {name: getattr(drop_in, name) for name in drop_in.__all__}
NAMES = [name for name, kind in CLASSES.items() if issubclass(kind, Noising)]
METHODS = [(name, "add_noise") for name in NAMES]
METHODS += [(name, "get_velocity") for name in NAMES if issubclass(CLASSES[name], Velocity)]
SHAPES = ((3, 4, 8, 8), (3, 5), (3,), (3, 2, 4, 4, 4))
TIMESTEPS = {
    "each": torch.tensor([0, 500, 999]),
    "one": torch.tensor([7]),
    "a number": torch.tensor(9),
    "int32": torch.tensor([1, 2, 3], dtype=torch.int32),
    "from the end": torch.tensor([-1, -2, 5]),
}
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensors(shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@pytest.mark.parametrize("timesteps", TIMESTEPS.values(), ids=TIMESTEPS)
@pytest.mark.parametrize(("name", "method"), METHODS)
def test_parity_and_precision(name, method, timesteps):
    """In float32 as theirs; in any other dtype in theirs, and at least as near to float64 as theirs."""
    ours, theirs = pair(name)
    for shape, (dtype, other) in product(SHAPES, product(DTYPES, repeat=2)):
        x, noise = tensors(shape)
        x, noise = x.to(dtype), noise.to(other)
        our, their = (getattr(scheduler, method)(x, noise, timesteps) for scheduler in (ours, theirs))
        truth = getattr(theirs, method)(x.double(), noise.double(), timesteps)
        assert our.dtype == their.dtype
        assert our.shape == their.shape
        assert relative(our, truth) <= 1.01 * relative(their, truth) + 2.0**-23
        if dtype == other == torch.float32:
            assert relative(our, their) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_what_is_broadcast(name):
    ours, theirs = pair(name)
    x, noise = tensors((3, 4, 8, 8))
    timesteps = torch.tensor([1, 2, 3])
    for first, second in ((x[:1], noise), (x, noise[:1])):
        torch.testing.assert_close(ours.add_noise(first, second, timesteps), theirs.add_noise(first, second, timesteps))


def test_gradients():
    ours, theirs = pair("DDPMScheduler")
    gradients = []
    for scheduler in (ours, theirs):
        x, noise = (value.requires_grad_() for value in tensors((3, 4, 8, 8)))
        scheduler.add_noise(x, noise, torch.tensor([1, 500, 900])).square().sum().backward()
        gradients.append((x.grad, noise.grad))
    for our, their in zip(*gradients, strict=True):
        assert relative(our, their) < 1e-5


def test_other_alphas_count():
    ours, theirs = pair("DDIMScheduler")
    x, noise = tensors((3, 4, 8, 8))
    for scheduler in (ours, theirs):
        scheduler.add_noise(x, noise, torch.tensor([5]))
        scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.5
    our, their = (scheduler.add_noise(x, noise, torch.tensor([5])) for scheduler in (ours, theirs))
    assert relative(our, their) < 1e-6


def test_alphas_stay_where_they_are():
    """diffusers moves them to the samples' device, from which a step would have to read them back."""
    ours, _ = pair("DDPMScheduler")
    kept = ours.alphas_cumprod
    x, noise = tensors((3, 4))
    ours.add_noise(x.double(), noise, torch.tensor([5]))
    ours.add_noise(x.to("meta"), noise.to("meta")[:1], torch.tensor([5]))
    assert ours.alphas_cumprod is kept


def run_with_noise(scheduler, x, noise):
    """Every timestep of a run noised before and after the steps, which go on in between."""
    scheduler.set_timesteps(10)
    results, state = [], noise
    for index, t in enumerate(scheduler.timesteps[:5]):
        state = scheduler.step(network(state, t), t, state, return_dict=False)[0]
        for timesteps in (
            t,
            scheduler.timesteps[index : index + 1],
            scheduler.timesteps[index : index + 3],
            t.expand(3),
        ):
            results.append(scheduler.add_noise(x, noise, timesteps.long()))
    return [*results, state]


@pytest.mark.parametrize("name", NAMES)
def test_between_steps(name):
    """As in inpainting, with timesteps out of the schedule."""
    x, noise = tensors((3, 4, 8, 8))
    results = []
    for scheduler in pair(name):
        torch.manual_seed(0)
        results.append(run_with_noise(scheduler, x, noise))
    for our, their in zip(*results, strict=True):
        assert relative(our, their) < 1e-5


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_nothing_waits(name, method):
    scheduler, _ = pair(name)
    scheduler.set_timesteps(10)
    x, noise = tensors((3, 4, 8, 8))
    scheduler.timesteps = on_device(scheduler.timesteps)
    expected = getattr(scheduler, method)(x, noise, scheduler.timesteps[2:5])
    scheduler._scales = {place: on_device(scales) for place, scales in scheduler._scales.items()}
    with the_device_is_not_read():
        found = getattr(scheduler, method)(on_device(x), on_device(noise), scheduler.timesteps[2:5])
    assert torch.equal(found.as_subclass(torch.Tensor), expected.as_subclass(torch.Tensor))
