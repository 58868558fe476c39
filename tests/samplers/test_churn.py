"""Stochastic churn: Karras et al. 2022, algorithm 2, in a loop of its own, k-diffusion and diffusers."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers_peer import assert_parity, network, relative, scheduler_for, table_for
from interpret import trajectory
from k_diffusion_steps import SCHEDULE as VE
from k_diffusion_steps import SHAPE, denoise, noises, their_states
from mixture import Mixture
from stochastic import assert_distribution, assert_power

from fastdiff import ops, samplers, schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import INPUT_SCALE, KNOWN
from fastdiff.samplers.churn import churn_from
from fastdiff.samplers.problem import Problem

VP, MIXTURE = schedules.linear(1000), Mixture()
ROWS = {"euler": 1, "heun": 2, "dpm2": 2}
CHURNS = {
    "everywhere": {"s_churn": 4.0},
    "clamped": {"s_churn": 90.0, "s_noise": 1.003},
    "between": {"s_churn": 3.0, "s_tmin": 0.3, "s_tmax": 20.0},
    "above": {"s_churn": 3.0, "s_tmin": 2.0, "s_noise": 0.7},
}


def algorithm_2(method, levels, y, z, *, s_churn, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """The states before each network call but the first, and the result."""
    steps, states = len(levels) - 1, []

    def slope(y, t):
        states.append(y)
        return (y - MIXTURE.denoise(y, 1.0, t)) / t

    for i in range(steps):
        t, t1 = levels[i], levels[i + 1]
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_tmin <= t <= s_tmax else 0.0
        hat = t + gamma * t
        y = y + math.sqrt(hat**2 - t**2) * s_noise * z[i]
        d = slope(y, hat)
        if t1 == 0.0 or method == "euler":
            y = y + (t1 - hat) * d
        elif method == "heun":
            y = y + (t1 - hat) * (d + slope(y + (t1 - hat) * d, t1)) / 2
        else:
            middle = math.exp((math.log(hat) + math.log(t1)) / 2)
            y = y + (t1 - hat) * slope(y + (middle - hat) * d, middle)
    return [*states[1:], y]


@pytest.mark.parametrize("churn", CHURNS)
@pytest.mark.parametrize("method", ROWS)
@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_the_papers_loop(method, churn, prediction):
    generator, steps, options = np.random.default_rng(0), 9, CHURNS[churn]
    grid = {"spacing": "karras", "sigma_max": 50.0}
    table = samplers.build(method, schedule=VP, steps=steps, prediction=prediction, **grid, **options)
    levels = table.grid.noise_ratios
    z = generator.standard_normal((steps + 1, 40))
    y = levels[0] * generator.standard_normal(40)
    expected = algorithm_2(method, levels, y, z, **options)
    hat = table.init_level[1]
    raised = y + math.sqrt(hat**2 - levels[0] ** 2) * options.get("s_noise", 1.0) * z[0]
    found = trajectory(MIXTURE.denoiser(VP, prediction), table, raised, lambda index: z[index // ROWS[method] + 1])
    for ours, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("initial", ["unit", "sigma", "marginal"])
@pytest.mark.parametrize("schedule", [VP, VE], ids=["vp", "ve"])
def test_the_start_is_raised_too(schedule, initial):
    options = {"schedule": schedule, "steps": 9, "prediction": "sample", "spacing": "karras", "sigma_max": 50.0}
    plain = samplers.build("euler", initial=initial, **options)
    table = samplers.build("euler", initial=initial, s_churn=4.0, s_noise=1.1, **options)
    r = 50.0
    base = math.sqrt(1 + r * r) if initial == "marginal" or (initial == "unit" and schedule is VP) else r
    assert plain.init_scale == pytest.approx(base, rel=1e-12)
    hat = (1 + min(4 / 9, math.sqrt(2) - 1)) * r
    assert table.init_level == pytest.approx((1.0, hat), rel=1e-12)
    assert table.init_scale == pytest.approx(math.sqrt(base**2 + 1.1**2 * (hat**2 - r**2)), rel=1e-12)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("heun", {"s_churn": 3.0}),
        ("dpm2", {"s_churn": 3.0}),
        ("euler", {"s_churn": 3.0}),
        ("dpm2_ancestral", {}),
        ("restart", {"intervals": ((0.3, 9.0, 2, 4),)}),
    ],
    ids=str,
)
def test_every_row_ends_at_the_level_it_says(method, options):
    """For data that is 0 the state is noise, whose standard deviation is the level that inpainting re-noises to."""
    table = samplers.build(method, schedule=VP, steps=8, prediction="sample", spacing="karras", **options)
    x = np.random.default_rng(1).standard_normal(200_000)
    x *= table.init_level[1] / x.std()
    draw = np.random.default_rng(2)
    states = trajectory(lambda y, t: 0.0 * y, table, x, lambda _: draw.standard_normal(len(x)))
    for row, state in zip(table.rows, states, strict=True):
        assert state.std() == pytest.approx(row[KNOWN][1], rel=0.01)


def test_in_x_the_same_noise_is_added():
    """`Churn.steps` for methods whose state is x = alpha y: the signal's share is kept, the noise scaled."""
    churn = churn_from("heun", 3.0, 0.0, None, 1.1)
    points = samplers.grid.build(VP, 6, samplers.grid.GridOptions(spacing="karras"))
    problem = Problem(VP, points, "v", None)
    for in_y, in_x in zip(churn.steps(problem), churn.steps(problem, scaled=False), strict=True):
        y, x = in_y.raised({"x": 1.0}), in_x.raised({"x": 1.0})
        assert x["x"] == pytest.approx(in_x.to.alpha / in_x.end.alpha, rel=1e-12)
        assert x["noise"] == pytest.approx(in_x.to.alpha * y["noise"], rel=1e-12)
        assert in_x.to.ratio == pytest.approx(in_y.to.ratio, rel=1e-12)
    start = problem.points()[0]
    first = churn.raise_level(problem, start, scaled=False)
    in_y = math.sqrt((1.0 / start.alpha) ** 2 + 1.1**2 * (first.ratio**2 - start.ratio**2))
    assert churn.init_scale(problem, 1.0, scaled=False) == pytest.approx(first.alpha * in_y, rel=1e-12)


def test_a_start_without_signal_is_not_raised():
    """In x, where sigma / alpha is infinite already."""
    schedule = schedules.flow(1000)
    problem = Problem(schedule, samplers.grid.build(schedule, 6, samplers.grid.GridOptions()), "flow", None)
    churn = churn_from("heun", 3.0, 0.0, None, 1.0)
    first = problem.points()[0]
    assert churn.raise_level(problem, first, scaled=False) is first
    assert churn.init_scale(problem, 1.0, scaled=False) == 1.0


def test_without_churn_nothing_changes():
    options = {"schedule": VP, "steps": 6, "prediction": "v"}
    for method in ROWS:
        plain = samplers.build(method, **options)
        same = samplers.build(method, **options, s_churn=5.0, s_tmin=300.0)
        assert np.array_equal(plain.rows, same.rows)
        assert plain.init_scale == same.init_scale


@pytest.mark.parametrize("method", ROWS)
def test_distribution(method):
    assert_distribution(method, s_churn=40.0, sigma_max=50.0)


def test_a_wrong_churn_coefficient_is_seen():
    assert_power("heun", s_churn=100.0, sigma_max=50.0)


@pytest.mark.parametrize("churn", CHURNS)
@pytest.mark.parametrize("method", ROWS)
def test_k_diffusion(method, churn, monkeypatch):
    """It draws noise in every step, used or not."""
    options, steps = CHURNS[churn], 10
    drawn = noises()
    z = [next(drawn) for _ in range(steps + 1)]
    remaining = iter(z)
    monkeypatch.setattr(torch, "randn_like", lambda _: next(remaining))
    grid = samplers.build("euler", schedule=VE, steps=steps, prediction="sample", spacing="karras").grid
    sigmas = torch.from_numpy(grid.sigmas).float()
    table = samplers.build(method, schedule=VE, prediction="sample", sigmas=sigmas.tolist(), **options)
    theirs, levels = their_states(method.replace("dpm2", "dpm_2"), sigmas, **options)
    np.testing.assert_allclose(table.timesteps, levels, rtol=1e-6)

    x = float(sigmas[0]) * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    raised = math.sqrt(table.init_level[1] ** 2 - float(sigmas[0]) ** 2) * options.get("s_noise", 1.0)
    x, anchor = x + raised * z[0], None
    for index, (use, right) in enumerate(zip(table.uses, theirs, strict=True)):
        noise = z[index // ROWS[method] + 1] if use.noise else None
        m = denoise(x, float(table.timesteps[index]))
        given = {"anchor": anchor if use.anchor else None, "noise": noise, "new_anchor": use.new_anchor}
        step = ops.sampler_step(x, m, table.tensor(), index, **given)
        x, anchor = step.x, anchor if step.anchor is None else step.anchor
        assert relative(x, right) < 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("churn", CHURNS)
def test_diffusers_euler(prediction, churn):
    """It adds the noise after the network was called."""
    options = CHURNS[churn]
    for steps in (2, 7, 20):
        scheduler = scheduler_for("euler", "scaled_linear", prediction)
        assert_parity(table_for("euler", scheduler, prediction, steps, **options), scheduler, **options)


@pytest.mark.parametrize("config", [{}, {"sigma_schedule": "exponential"}, {"final_sigmas_type": "sigma_min"}], ids=str)
@pytest.mark.parametrize("churn", [{}, CHURNS["between"]], ids=str)
def test_diffusers_edm_euler(config, churn):
    scheduler = diffusers.EDMEulerScheduler(**config)
    scheduler.set_timesteps(18)
    schedule = schedules.edm(1000)
    grid = {"spacing": config.get("sigma_schedule", "karras")}
    if config.get("final_sigmas_type"):
        grid |= {"final_sigma": "schedule", "endpoint": True}
    options = {**grid, **churn, "churn_call": "before", "initial": "marginal"}
    table = samplers.build("euler", schedule=schedule, steps=18, prediction="edm", **options)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps, rtol=1e-6, atol=1e-6)
    assert table.init_scale == pytest.approx(float(scheduler.init_noise_sigma), rel=1e-6)
    generator, twin = (torch.Generator().manual_seed(7) for _ in range(2))
    x = table.init_scale * torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    scale = table.first_input_scale
    for index, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(x, t)
        assert relative(scale * x, model_input) < 1e-6
        m = network(schedule, "edm", x, float(table.timesteps[index]))
        theirs = scheduler.step(m, t, x, generator=generator, **churn).prev_sample
        noise = torch.randn(SHAPE, generator=twin) if table.uses[index].noise else None
        ours = ops.sampler_step(x, m, table.tensor(), index, noise=noise).x
        assert relative(ours, theirs) < 1e-5
        x, scale = theirs, table.rows[index, INPUT_SCALE]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("euler", {"s_churn": -1.0}, "euler: s_churn: expected a number from 0 to inf, got -1.0"),
        ("heun", {"s_tmin": float("nan")}, "heun: s_tmin: expected a number"),
        ("dpm2", {"s_noise": True}, "dpm2: s_noise: expected a number"),
        ("euler", {"churn_call": "after"}, "churn_call: expected one of raised, before"),
        ("euler", {"churn_call": "before", "s_churn": 1.0, "clip": 1.0}, "'before' has no data prediction"),
    ],
    ids=str,
)
def test_bad_options_are_refused(method, options, message):
    with pytest.raises(InputError, match=message):
        samplers.build(method, schedule=VP, steps=5, prediction="v", **options)
