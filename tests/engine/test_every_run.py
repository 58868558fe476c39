"""Every method of the registry from an image, with a kept part, and the inverse ones."""

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import ops, samplers, schedules
from fastdiff.errors import InputError
from fastdiff.noise import STREAM_INITIAL, seed_tensor

SHAPE = (2, 2, 4, 5)
SEEDS = [4, -2]
STEPS = 6
IMAGE = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) * 2.0 - 1.0
MASK = torch.zeros(SHAPE[2:])
MASK[:, 3:] = 1.0
FROM_NOISE = [name for name, info in samplers.methods().items() if not info.inverse]
SCHEDULES = {"flow": schedules.flow(1000), "ve": schedules.edm(1000), "vp": schedules.linear(1000)}


def table(method: str, **options) -> samplers.StepTable:
    kinds = samplers.methods()[method].kinds or ("vp",)
    schedule = SCHEDULES["vp" if "vp" in kinds else kinds[0]]
    prediction = "epsilon" if samplers.methods()[method].inverse else "sample"
    return samplers.build(method, schedule=schedule, steps=STEPS, prediction=prediction, **options)


def denoiser(x, t):
    """A bounded, wavy data prediction, in NumPy or torch; twice the channels are its variance channels."""
    if isinstance(x, np.ndarray):
        return 0.8 * np.sin(1.5 * x + 0.001 * t)
    return 0.8 * torch.sin(1.5 * x + 0.001 * t.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("method", FROM_NOISE)
def test_a_part_of_an_image_is_kept(method):
    arguments = {"seeds": SEEDS, "image": IMAGE, "mask": MASK}
    found = fastdiff.run(denoiser, table(method), **arguments)
    assert torch.equal(found[..., :3], IMAGE[..., :3])
    assert torch.isfinite(found).all()
    assert not torch.isclose(found[..., 3:], IMAGE[..., 3:]).any()


@pytest.mark.parametrize("method", FROM_NOISE)
def test_the_last_half_of_the_steps_starts_from_a_noised_image(method):
    half, states = table(method, strength=0.5), []
    # LCM and TCD take all their steps within the part that is left.
    assert half.grid.steps == (STEPS if method in ("lcm", "tcd") else STEPS // 2)
    signal, noise = half.init_level
    assert noise < table(method).init_level[1] or signal > table(method).init_level[0]

    def remember(x, t):
        states.append(x)
        return denoiser(x, t)

    fastdiff.run(remember, half, seeds=SEEDS, image=IMAGE)
    drawn = ops.philox_normal(seed_tensor(SEEDS), SHAPE, stream=STREAM_INITIAL)
    expected = half.first_input_scale * (signal * IMAGE + noise * drawn)
    torch.testing.assert_close(states[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [name for name, info in samplers.methods().items() if info.inverse])
def test_an_inverse_method_starts_from_the_image_itself(method):
    steps, states = table(method), []

    def remember(x, t):
        states.append(x)
        return denoiser(x, t)

    found = fastdiff.run(remember, steps, seeds=SEEDS, image=IMAGE)
    torch.testing.assert_close(states[0], steps.first_input_scale * steps.init_level[0] * IMAGE)
    assert torch.equal(found, fastdiff.run(denoiser, steps, seeds=[8, 9], image=IMAGE))
    with pytest.raises(InputError, match=r"image: expected one with .*, which goes from an image to its noise"):
        fastdiff.run(denoiser, steps, shape=SHAPE, seeds=SEEDS)
    with pytest.raises(InputError, match=r"mask: expected None with .*, which goes from a whole image"):
        fastdiff.run(denoiser, steps, seeds=SEEDS, image=IMAGE, mask=MASK)


@pytest.mark.parametrize("method", FROM_NOISE)
def test_the_network_sees_the_kept_part_at_the_level_it_is_told(method):
    """alpha(t) image + sigma(t) noise at every call, midpoints too, whatever space the method's state is in."""
    kinds = samplers.methods()[method].kinds or ("vp",)
    kind = "vp" if "vp" in kinds else kinds[0]
    schedule, seen = SCHEDULES[kind], []

    def remember(x, t):
        seen.append((x, t.double().numpy()))
        return denoiser(x, t)

    fastdiff.run(remember, table(method, strength=0.7), seeds=SEEDS, image=IMAGE, mask=MASK)
    drawn = ops.philox_normal(seed_tensor(SEEDS), SHAPE, stream=STREAM_INITIAL)
    for x, t in seen:
        alpha, sigma = (torch.from_numpy(value).float().reshape(-1, 1, 1, 1) for value in schedule.at(t))
        expected = alpha * IMAGE + sigma * drawn
        torch.testing.assert_close(x[..., :3], expected[..., :3], rtol=1e-4, atol=1e-4)
