"""Dynamic thresholding and Langevin steps in the loop: each sample's own numbers."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers_peer import CLASSES, SCHEDULES, relative, schedule_of, table_for

import fastdiff
from fastdiff import ops, samplers, schedules
from fastdiff.noise import STREAM_INITIAL, STREAM_STEP, seed_tensor
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import make_row, make_table

SHAPE = (3, 2, 9, 7)
SEEDS = [4, 9, -2]


def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Data predictions of another size in each sample, beyond [-1, 1]."""
    size = torch.tensor([1.0, 2.0, 4.0]).reshape(-1, 1, 1, 1)[: len(x)]
    return size * torch.sin(2.0 * x + 0.001 * t.reshape(-1, 1, 1, 1))


@pytest.mark.parametrize("maximum", [1.5, 100.0])
@pytest.mark.parametrize("method", ["ddim", "dpmpp_2m"])
def test_dynamic_threshold_as_in_diffusers(method, maximum):
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": maximum}
    options = {**SCHEDULES["linear"], "prediction_type": "sample", **config}
    if method == "ddim":
        options["clip_sample"] = False
    scheduler = getattr(diffusers, CLASSES[method])(1000, **options)
    scheduler.set_timesteps(6)
    threshold = {"clip": None, "dynamic_threshold": 0.9, "dynamic_maximum": maximum}
    table = table_for(method, scheduler, "sample", 6, **threshold)
    states = []
    arguments = {"shape": SHAPE, "seeds": SEEDS, "callback": lambda info: states.append(info.x)}
    fastdiff.run(denoiser, table, **arguments)
    x = ops.philox_normal(seed_tensor(SEEDS), SHAPE, stream=STREAM_INITIAL)
    assert len(states) == len(scheduler.timesteps)
    for t, state in zip(scheduler.timesteps, states, strict=True):
        x = scheduler.step(denoiser(x, t.reshape(1)), t, x).prev_sample
        assert relative(state, x) < 1e-5
    assert schedule_of(scheduler).kind == "vp"
    assert float(states[-1].abs().max()) <= 1.0 + 1e-6


def test_a_threshold_keeps_what_lies_within_the_clip():
    small = lambda x, t: 0.2 * torch.sin(x)  # noqa: E731
    options = {"schedule": schedules.linear(1000), "steps": 5, "prediction": "sample"}
    plain = samplers.build("ddim", clip=1.0, **options)
    bounded = samplers.build("ddim", dynamic_threshold=0.99, **options)
    found = [fastdiff.run(small, table, shape=SHAPE, seeds=SEEDS) for table in (plain, bounded)]
    assert torch.equal(*found)


def langevin(problem: Problem, snr: float) -> samplers.StepTable:
    """One Langevin row at the grid's first point: x + e * score + sqrt(2 e) * z."""
    start = problem.points()[0]
    score = type(start.noise)(-start.noise.x / start.sigma, -start.noise.m / start.sigma)
    row = make_row(problem, start, {"x": 1.0, "D": 1.0, "noise": 1.0}, to=start, data=score, clip=False, snr=snr)
    return make_table("ddim", problem, [row])


def test_a_langevin_row():
    """Song et al. 2021, algorithm 5, with the norms of each sample."""
    schedule = schedules.linear(1000)
    grid = samplers.grid.build(schedule, 3, samplers.grid.GridOptions())
    table = langevin(Problem(schedule, grid, "v", clip=1.0), snr=0.16)
    found = fastdiff.run(denoiser, table, shape=SHAPE, seeds=SEEDS).double().numpy()
    keys = seed_tensor(SEEDS)
    x, z = (
        ops.philox_normal(keys, SHAPE, step=0, stream=stream).double().numpy()
        for stream in (STREAM_INITIAL, STREAM_STEP)
    )
    alpha, sigma = float(grid.alphas[0]), float(grid.sigmas[0])
    t = torch.full((3,), int(grid.timesteps[0]))
    m = denoiser(torch.from_numpy(x).float(), t).double().numpy()
    score = -(alpha * m + sigma * x) / sigma

    def norm(values):
        return np.sqrt((values**2).sum(axis=(1, 2, 3), keepdims=True))

    step = 2.0 * (0.16 * norm(z) / norm(score)) ** 2
    np.testing.assert_allclose(found, x + step * score + np.sqrt(2.0 * step) * z, rtol=1e-4, atol=1e-5)
