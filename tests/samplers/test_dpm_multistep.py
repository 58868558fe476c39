"""Multistep DPM-Solver and DPM-Solver++: every state against the papers' integrals, orders, distributions, churn."""

import math
from itertools import pairwise

import numpy as np
import pytest
from convergence import assert_order, distance
from interpret import trajectory
from lambda_integral import integral
from mixture import Mixture
from stochastic import assert_distribution, assert_power

from fastdiff import samplers, schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import INPUTS, NEW_X

VP, FLOW = schedules.linear(1000), schedules.flow(1000, shift=2.0)
KINDS = {
    "vp": (schedules.cosine(1000), "epsilon"),
    "flow": (FLOW, "flow"),
    "ve": (schedules.ve(1000, sigma_min=0.02, sigma_max=50.0), "sample"),
    "sub_vp": (schedules.sub_vp_sde(1000), "epsilon"),
}
CASES = {
    "dpmpp_2m": {},
    "dpmpp_2m-heun": {"solver": "heun"},
    "dpmpp_2m-order1": {"order": 1},
    "dpmpp_2m_sde": {},
    "dpmpp_2m_sde-heun": {"solver": "heun", "eta": 0.6, "s_noise": 1.1},
    "dpmpp_2m_sde-order1": {"order": 1},
    "dpmpp_3m": {},
    "dpmpp_3m-half": {"curvature": "half", "solver": "heun"},
    "dpmpp_3m_sde": {},
    "dpmpp_3m_sde-half": {"curvature": "half", "solver": "midpoint", "eta": 0.4},
    "dpm_solver": {},
    "dpm_solver-heun": {"solver": "heun"},
    "dpm_solver-order1": {"order": 1},
    "dpm_solver-order3": {"order": 3},
    "dpm_solver-half": {"order": 3, "curvature": "half"},
    "dpm_solver-clip": {"clip": 0.5, "order": 3},
    "dpm_solver_sde": {},
    "dpm_solver_sde-heun": {"solver": "heun", "eta": 0.6, "s_noise": 1.1},
    "dpm_solver_sde-order1": {"order": 1},
}
X = np.linspace(-2.0, 2.0, 7)


def states(
    method: str, grid, noises, *, order=None, eta=None, s_noise=1.0, solver=None, curvature="exact", clip=np.inf
):
    """The states of the method after each step, written from the papers' integrals with the exact denoiser."""
    order = order or (3 if "3m" in method else 2)
    solver = solver or ("heun" if method == "dpmpp_3m_sde" else "midpoint")
    eta = (1.0 if eta is None else eta) if method.endswith("sde") else 0.0
    x, steps = X * (grid.sigmas[0] if grid.sigmas[0] > 1.0 else 1.0), grid.steps
    with np.errstate(divide="ignore"):
        lam = np.log(grid.alphas / grid.sigmas)
    past, places = [], []
    for i in range(steps):
        (alpha, alpha1), (sigma, sigma1) = grid.alphas[i : i + 2], grid.sigmas[i : i + 2]
        data = np.clip(Mixture().denoise(x, alpha, sigma), -clip, clip)
        epsilon = (x - alpha * data) / sigma
        past, places = [data if "pp" in method else epsilon, *past][:3], [lam[i], *places][:3]
        possible = min(order, sum(np.isfinite(places)), steps - i if steps < 15 else order)
        earlier = [place - lam[i] for place in places[1:possible]]
        if sigma1 == 0.0:
            x = data
        elif alpha == 0.0:
            # From no signal: x is epsilon alone, to which an SDE adds its noise.
            kept = 0.0 if eta else 1.0
            x = alpha1 * data + sigma1 * (kept * epsilon + (1.0 - kept) * s_noise * noises[i])
        else:
            h = lam[i + 1] - lam[i]
            known = past[: len(earlier) + 1]
            about = known, earlier, "heun" if len(known) == 3 else solver, curvature == "half"
            if "pp" in method:
                drift = alpha1 * (1.0 + eta) * integral(-(1.0 + eta), h, *about)
                kept, std = sigma1 / sigma * math.exp(-eta * h), sigma1 * math.sqrt(1.0 - math.exp(-2.0 * eta * h))
            else:
                drift = -(1.0 + eta) * sigma1 * integral(1.0, h, *about)
                kept, std = alpha1 / alpha, sigma1 * math.sqrt(eta * (math.exp(2.0 * h) - 1.0))
            x = kept * x + drift + std * s_noise * noises[i]
        yield x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_states(case, kind):
    method, (schedule, prediction) = case.split("-")[0], KINDS[kind]
    noises = np.random.default_rng(3).standard_normal((20, len(X)))
    spacing = {} if kind == "flow" else {"spacing": "karras", "sigma_max": 50.0}
    if case.startswith("dpm_solver_sde") and kind == "flow":
        spacing = {"spacing": "karras", "sigma_max": 0.95}
    for steps in (1, 2, 3, 4, 16):
        table = samplers.build(method, schedule=schedule, steps=steps, prediction=prediction, **spacing, **CASES[case])
        expected = states(method, table.grid, noises, **CASES[case])
        start = X * (table.grid.sigmas[0] if table.grid.sigmas[0] > 1.0 else 1.0)
        found = trajectory(Mixture().denoiser(schedule, prediction), table, start, lambda i: noises[i])
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max())


FULL = {"lower_order_final": False}
ORDERS = {
    "dpmpp_2m-order1": (VP, "epsilon", 1, {"order": 1}),
    "dpmpp_3m": (VP, "v", 3, {}),
    "dpmpp_3m-sample": (VP, "sample", 3, {"solver": "heun"}),
    "dpmpp_3m_sde": (VP, "v", 3, {"eta": 0.0}),
    "dpm_solver": (VP, "epsilon", 2, {}),
    "dpm_solver-heun": (VP, "v", 2, {"solver": "heun"}),
    "dpm_solver-order1": (VP, "epsilon", 1, {"order": 1}),
    "dpm_solver_sde": (VP, "v", 2, {"eta": 0.0}),
}


@pytest.mark.parametrize("case", ORDERS)
def test_order_of_convergence(case):
    schedule, prediction, order, options = ORDERS[case]
    method = case.split("-")[0]
    assert_order(order, method, schedule, prediction, **FULL, **options)
    assert "order" in options or samplers.methods()[method].order == order


@pytest.mark.parametrize(("method", "options"), [("dpmpp_3m", {}), ("dpm_solver", {"order": 3})], ids=str)
@pytest.mark.parametrize(("schedule", "prediction"), [(VP, "epsilon"), (FLOW, "flow")], ids=["vp", "flow"])
def test_third_order_after_a_short_start(method, options, schedule, prediction):
    """The first two steps are of order 1 and 2, and their errors hide the third order unless they are short: lambda
    rises with the square of the step's number here."""
    first, last = (19.0, 1.0 / 19.0) if schedule.kind == "flow" else (50.0, 0.05)
    errors = []
    for steps in (160, 320, 640):
        ratios = first * (last / first) ** (np.linspace(0.0, 1.0, steps + 1) ** 2)
        levels = ratios / (1.0 + ratios) if schedule.kind == "flow" else ratios
        points = {"sigmas": levels.tolist(), "final_sigma": "last"}
        table = samplers.build(method, schedule=schedule, prediction=prediction, **points, **options, **FULL)
        errors.append(distance(table, schedule))
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    assert slopes[-1] == pytest.approx(3.0, abs=0.06), slopes


DISTRIBUTIONS = {
    "dpmpp_2m_sde-order1": {"order": 1},
    "dpmpp_3m_sde": {},
    "dpmpp_3m_sde-half": {"eta": 0.5, "curvature": "half"},
    "dpm_solver_sde": {},
    "dpm_solver_sde-heun": {"solver": "heun", "eta": 0.5},
    "dpmpp_2m-churn": {"s_churn": 10.0},
    "dpmpp_2m-order1-churn": {"order": 1, "s_churn": 40.0},
    "dpmpp_3m-churn": {"s_churn": 10.0, "s_tmin": 0.05, "s_tmax": 20.0},
}


@pytest.mark.parametrize("case", DISTRIBUTIONS)
def test_distribution(case):
    assert_distribution(case.split("-")[0], **DISTRIBUTIONS[case])


@pytest.mark.parametrize("case", ["dpmpp_3m_sde", "dpm_solver_sde", "dpmpp_2m-order1-churn"])
def test_a_wrong_noise_coefficient_is_seen(case):
    assert_power(case.split("-")[0], **DISTRIBUTIONS[case])


def test_churn():
    """Karras et al. 2022, algorithm 2, around steps of DPM-Solver++ (2M) with the raised levels' own h0."""
    schedule, steps = schedules.ve(1000, sigma_min=0.02, sigma_max=50.0), 60
    options = {"s_churn": 20.0, "s_tmin": 0.1, "s_tmax": 20.0, "s_noise": 1.05}
    table = samplers.build("dpmpp_2m", schedule=schedule, steps=steps, prediction="sample", **FULL, **options)
    sigmas, noises = table.grid.sigmas, np.random.default_rng(3).standard_normal((steps, len(X)))
    raised = [s * (4.0 / 3.0) if 0.1 <= s <= 20.0 else s for s in sigmas[:-1]]
    assert any(high > before for before, high in pairwise(raised))
    found = [*trajectory(Mixture().denoiser(schedule, "sample"), table, 50.0 * X, lambda i: noises[i])]
    x, last, churned = 50.0 * X, None, 0
    for i in range(steps):
        high, low = raised[i], sigmas[i + 1]
        data = corrected = Mixture().denoise(x, 1.0, high)
        if last is not None and low > 0.0 and high < raised[i - 1]:
            corrected = data + 0.5 * math.log(high / low) / math.log(raised[i - 1] / high) * (data - last)
        x, last = low / high * x + (1.0 - low / high) * corrected, data
        if i + 1 < steps and raised[i + 1] > low:
            x = x + 1.05 * math.sqrt(raised[i + 1] ** 2 - low**2) * noises[i]
            churned += 1
        np.testing.assert_allclose(found[i], x, rtol=1e-9)
    assert 2 < churned < steps - 2


@pytest.mark.parametrize(
    "schedule", [schedules.ve(1000, sigma_max=50.0), VP, schedules.flow(1000)], ids=lambda s: s.name
)
def test_churn_raises_the_start(schedule):
    options = {"schedule": schedule, "steps": 10, "prediction": "sample", "s_churn": 2.0, "s_noise": 1.5}
    spacing = {"spacing": "karras", "sigma_max": 0.9 if schedule.kind == "flow" else 40.0}
    table, plain = (
        samplers.build("dpmpp_2m", **options, **spacing),
        samplers.build("dpmpp_2m", **options | {"s_churn": 0.0}, **spacing),
    )
    r = 9.0 if schedule.kind == "flow" else 40.0
    alpha, sigma = (float(value) for value in schedule.from_ratio(1.2 * r))
    assert table.init_level == pytest.approx((alpha, sigma), rel=1e-12)
    kept = plain.init_scale * alpha / plain.init_level[0]
    assert table.init_scale == pytest.approx(math.hypot(kept, 1.5 * alpha * r * math.sqrt(0.44)), rel=1e-12)
    assert table.timesteps[0] == pytest.approx(float(schedule.timestep_of(1.2 * r)))
    assert not any(use.noise for use in plain.uses)
    # The state is at the level that the next step starts from, which is what a kept part of an image is brought to.
    level = [float(value) for value in schedule.from_ratio(1.2 * plain.grid.noise_ratios[1])]
    assert table.levels[1].tolist() == pytest.approx(level, rel=1e-12)


def test_churn_leaves_a_start_without_signal():
    options = {"schedule": FLOW, "steps": 6, "prediction": "flow"}
    table = samplers.build("dpmpp_2m", s_churn=6.0, **options)
    assert table.init_level == (0.0, 1.0)
    assert np.isfinite(table.rows[:, NEW_X]).all()
    assert [row[NEW_X][INPUTS.index("noise")] > 0.0 for row in table.rows] == [True] * 5 + [False]


def test_the_tail_of_a_grid_is_as_long_as_the_whole():
    """Fewer than 15 steps lower the last; 10 that a start from an image leaves of 20 are not fewer."""
    options = {"schedule": VP, "prediction": "v", "final_sigma": "schedule"}
    whole = samplers.build("dpmpp_3m", steps=20, **options)
    assert whole.uses[-1].history == 2
    tail = samplers.build("dpmpp_3m", steps=20, strength=0.5, **options)
    np.testing.assert_array_equal(tail.rows[2:], whole.rows[12:])
    assert samplers.build("dpmpp_3m", steps=10, **options).uses[-1].history == 0


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dpmpp_3m", FULL),
        ("dpmpp_2m_sde", FULL),
        ("dpm_solver", FULL),
        ("dpm_solver_singlestep", {}),
        ("dpmpp_sde", {}),
    ],
    ids=str,
)
def test_a_step_of_no_length_changes_nothing(method, options):
    """As diffusers' last one is where its Karras levels end at sigma_min."""
    end = {"spacing": "karras", "endpoint": True, "final_sigma": "schedule"}
    table = samplers.build(method, schedule=VP, steps=20, prediction="v", **end, **options)
    expected = np.zeros(len(INPUTS))
    expected[0] = 1.0
    np.testing.assert_allclose(table.rows[-1, NEW_X], expected, atol=1e-12)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dpm_solver", {"order": 4}, "dpm_solver: order: expected a whole number from 1 to 3, got 4"),
        ("dpm_solver", {"solver": "taylor"}, "solver: expected one of midpoint, heun"),
        ("dpm_solver", {"curvature": "offset"}, "curvature: expected one of exact, half, got 'offset'"),
        ("dpm_solver_sde", {"order": 3}, "dpm_solver_sde: order: expected a whole number from 1 to 2, got 3"),
        ("dpm_solver_sde", {"eta": 2.0}, "eta: expected a number from 0 to 1"),
        ("dpm_solver_sde", {"schedule": FLOW, "prediction": "flow"}, "'flow' keeps no signal at its first timestep"),
        ("dpmpp_2m", {"order": 3}, "dpmpp_2m: order: expected a whole number from 1 to 2, got 3"),
        ("dpmpp_3m_sde", {"curvature": "none"}, "curvature: expected one of exact, half, half_offset"),
        ("dpmpp_2m", {"s_churn": -1.0}, "dpmpp_2m: s_churn: expected a number from 0 to inf, got -1.0"),
        ("dpmpp_3m", {"s_tmin": "low"}, "dpmpp_3m: s_tmin: expected a number"),
    ],
    ids=str,
)
def test_bad_options_are_refused(method, options, message):
    with pytest.raises(InputError, match=message):
        samplers.build(method, **{"schedule": VP, "steps": 10, "prediction": "v", **options})
