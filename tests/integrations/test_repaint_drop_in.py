"""RePaintScheduler against diffusers: steps down, steps undone, and masks of every shape."""

import numpy as np
import pytest
import torch
from drop_in import SHAPE, network, pair, relative

NAME = "RePaintScheduler"
CONFIGS = {
    "defaults": {},
    "eta 1": {"eta": 1.0},
    "unclipped": {"eta": 0.4, "clip_sample": False, "beta_schedule": "scaled_linear"},
    "cosine": {"eta": 1.0, "beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"eta": 0.3, "beta_schedule": "sigmoid"},
    "betas of the caller": {"eta": 0.5, "trained_betas": np.linspace(1e-4, 0.02, 1000)},
}
MASKS = {
    "one channel": (1, 1, 8, 8),
    "whole": SHAPE,
    "each sample": (2, 1, 8, 8),
    "plane": (8, 8),
    "by channel": (4, 1, 1),
}


def image_and_mask(shape):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, *SHAPE[1:], generator=generator) * 2.0 - 1.0, torch.rand(shape, generator=generator)


def run(schedulers, dtype, mask_shape, rounded, check):
    """Down and up again, as the pipeline does; theirs leads."""
    theirs = schedulers[0]
    image, mask = (value.to(dtype) for value in image_and_mask(mask_shape))
    mask = mask.round() if rounded else mask
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    last = int(theirs.timesteps[0]) + 1
    for index, time in enumerate(theirs.timesteps.tolist()):
        results, states = [], []
        for scheduler in schedulers:
            generator = torch.Generator().manual_seed(index)
            if time < last:
                m, t = network(x, time), scheduler.timesteps[index]
                results.append(scheduler.step(m, t, x, image, mask, generator, return_dict=False))
            else:
                results.append((scheduler.undo_step(x, scheduler.timesteps[index - 1], generator),))
            states.append(generator.get_state().tolist())
        assert states[0] == states[1]
        for number, (their, our) in enumerate(zip(*results, strict=True)):
            assert our.dtype == their.dtype
            check(f"step {index}, result {number}", their, our)
        last, x = time, results[0][0]


def near(where, their, our):
    assert relative(our, their) < 1e-5, where


@pytest.mark.parametrize("rounded", [True, False], ids=["whole mask", "soft mask"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parity(config, rounded):
    for steps, length, count in ((1, 1, 1), (7, 2, 2), (20, 5, 3)):
        ours, theirs = pair(NAME, config)
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(steps, length, count)
        run((theirs, ours), torch.float32, (1, 1, 8, 8), rounded, near)


@pytest.mark.parametrize("shape", MASKS.values(), ids=MASKS)
def test_masks(shape):
    ours, theirs = pair(NAME, {"eta": 1.0})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10, 2, 2)
    run((theirs, ours), torch.float32, shape, True, near)


def test_a_mask_that_changes():
    ours, theirs = pair(NAME, {"eta": 1.0})
    image, mask = image_and_mask((1, 1, 8, 8))
    x = torch.randn(SHAPE)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10, 2, 2)
    for _ in range(2):
        results = [
            scheduler.step(0.5 * x, 500, x, image, mask, torch.Generator().manual_seed(0), return_dict=False)[0]
            for scheduler in (theirs, ours)
        ]
        assert relative(results[1], results[0]) < 1e-5
        mask.mul_(0.5)


def test_in_inference_mode():
    ours, theirs = pair(NAME, {"eta": 1.0})
    with torch.inference_mode():
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(5, 2, 2)
        run((theirs, ours), torch.float32, (1, 1, 8, 8), True, near)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half(dtype):
    """Rounded once: to half a unit in the last place of what theirs rounds at every operation."""
    ours, theirs = pair(NAME, {"eta": 1.0, "beta_schedule": "squaredcos_cap_v2"})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10, 2, 2)

    def check(where, their, our):
        assert our.isfinite().all(), where

    run((theirs, ours), dtype, (1, 1, 8, 8), True, check)
    image, mask = image_and_mask((1, 1, 8, 8))
    x = torch.randn(SHAPE).to(dtype)
    noise = torch.Generator().manual_seed(0)
    drawn = torch.randn(SHAPE, generator=noise, dtype=dtype).double()
    a, a1 = (ours.alphas_cumprod[t].double() for t in (500, 400))
    image, mask, m = image.to(dtype), mask.round().to(dtype), (0.5 * x).to(dtype)
    data = ((x.double() - (1 - a).sqrt() * m.double()) / a.sqrt()).clamp(-1, 1)
    std = ((1 - a1) / (1 - a) * (1 - a / a1)).sqrt()
    unknown = a1.sqrt() * data + (1 - a1 - std**2).sqrt() * m.double() + std * drawn
    known = a1.sqrt() * image.double() + (1 - a1).sqrt() * drawn
    truth = mask.double() * known + (1 - mask.double()) * unknown
    errors = [
        relative(scheduler.step(m, 500, x, image, mask, torch.Generator().manual_seed(0))[0], truth)
        for scheduler in (ours, theirs)
    ]
    assert errors[0] <= 1.01 * errors[1] + 2.0**-23


def test_training_noise_is_refused_as_in_diffusers():
    x = torch.randn(SHAPE)
    for scheduler in pair(NAME):
        with pytest.raises(NotImplementedError):
            scheduler.add_noise(x, x, torch.tensor([1, 2]))
