"""What depends on a sample's own numbers, in the loop: dynamic thresholds, Langevin steps, learned variances."""

import numpy as np
import pytest
import torch
from diffusers_peer import relative, schedule_of, scheduler_for, table_for
from interpret import solve

import fastdiff
from fastdiff import ops, samplers, schedules
from fastdiff.errors import InputError
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
@pytest.mark.parametrize(
    "method",
    [
        "ddim",
        "dpmpp_2m",
        "dpmpp_3m",
        "dpmpp_singlestep",
        "unipc",
        "deis",
    ],
)
def test_dynamic_threshold_as_in_diffusers(method, maximum):
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": maximum}
    if method == "ddim":
        config["clip_sample"] = False
    scheduler = scheduler_for(method, "linear", "sample", **config)
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
    if table.grid.sigmas[-1] == 0.0:
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


def calm(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Data predictions that do not multiply what rounding leaves."""
    return 0.8 * torch.sin(0.7 * x + 0.001 * t.reshape(-1, 1, 1, 1))


def assert_agrees(network, table: samplers.StepTable, expected: np.ndarray, **options) -> None:
    """Within 1e-5 in float32, or twice plain PyTorch's error where the method multiplies what rounding leaves."""

    def error() -> float:
        found = fastdiff.run(network, table, shape=SHAPE, seeds=SEEDS, **options).double().numpy()
        return float(np.linalg.norm(found - expected))

    with fastdiff.use_backend("reference"):
        plain = error()
    assert error() < max(1e-5 * np.linalg.norm(expected), 2.0 * plain)
    assert plain < 1e-4 * np.linalg.norm(expected)


def noise_of(row: int) -> np.ndarray:
    return ops.philox_normal(seed_tensor(SEEDS), SHAPE, step=row, stream=STREAM_STEP).double().numpy()


def in_float64(network, table: samplers.StepTable) -> np.ndarray:
    start = table.init_scale * ops.philox_normal(seed_tensor(SEEDS), SHAPE, stream=STREAM_INITIAL).double().numpy()

    def numpy_network(x, t):
        outputs = network(torch.from_numpy(x), torch.full((3,), t, dtype=torch.float64)).numpy()
        return np.split(outputs, 2, axis=1) if table.learned_variance else outputs

    return solve(numpy_network, table, start, noise_of)


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "euler_maruyama", "ancestral", "none"])
def test_correctors_of_the_reverse_sde(predictor):
    options = {"predictor": predictor, "corrector_steps": 2, "snr": 0.1, "prediction": "sample"}
    table = samplers.build("reverse_sde", schedule=schedules.vp_sde(1000), steps=5, **options)
    assert (table.snr > 0.0).any()
    assert_agrees(calm, table, in_float64(calm, table))


def test_a_classifier_moves_the_score_of_a_corrector_too():
    """epsilon - sigma s grad log p(y | x) is what it makes of an epsilon network, for data prediction and score."""
    schedule = schedules.vp_sde(1000)
    table = samplers.build("reverse_sde", schedule=schedule, steps=5, prediction="epsilon", corrector_steps=1)
    guidance = fastdiff.Guidance(classifier=lambda x, t: (0.4 * x - 0.15 * x**2).sum((1, 2, 3)), classifier_scale=0.7)

    def moved(x, t):
        sigma = torch.from_numpy(schedule.at(t.double().numpy())[1]).reshape(-1, 1, 1, 1)
        return calm(x, t) - 0.7 * sigma * (0.4 - 0.3 * x)

    assert_agrees(calm, table, in_float64(moved, table), guidance=guidance)


@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("variance", ["learned_range", "learned"])
def test_learned_variances(variance, guidance):
    """The network's second half says how much noise each element gets; of guided outputs the conditional one's."""
    table = samplers.build("ddpm", schedule=schedules.linear(1000), steps=6, variance=variance, prediction="sample")

    def learned(x, t):
        offset = -8.0 if variance == "learned" else 0.0
        return torch.cat([calm(x, t), offset + 0.9 * torch.cos(3.0 * x)], dim=1)

    def both(x, t):
        uncond, cond = x.chunk(2)
        return torch.cat([0.5 * learned(uncond, t[:3]), learned(cond, t[:3])])

    def combined(x, t):
        m, v = learned(x, t).chunk(2, dim=1)
        return torch.cat([0.5 * m + guidance * (m - 0.5 * m), v], dim=1)

    assert table.learned_variance
    expected = in_float64(learned if guidance is None else combined, table)
    network = learned if guidance is None else both
    assert_agrees(network, table, expected, guidance=guidance)
    with pytest.raises(InputError, match=r"denoiser: expected an output of shape \(3, 4, 9, 7\)"):
        fastdiff.run(denoiser, table, shape=SHAPE, seeds=SEEDS)
