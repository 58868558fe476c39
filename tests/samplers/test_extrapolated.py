"""Gradient estimation, Heun++ and the refined multistep method: orders, limits, and loops from their formulas."""

import math
from itertools import pairwise

import numpy as np
import pytest
from convergence import assert_order
from interpret import trajectory
from stochastic import assert_distribution, assert_power

from fastdiff import samplers, schedules
from fastdiff.ops.row import NEW_X

VP, FLOW = schedules.linear(1000), schedules.flow(1000, shift=2.0)
VE = schedules.ve(1000, sigma_min=0.02, sigma_max=80.0)
ORDERS = {
    "gradient_estimation": (1, {}),
    "gradient_estimation-3/2": (2, {"gamma": 1.5}),
    "heunpp2": (1, {}),
    "res_multistep": (2, {}),
}


@pytest.mark.parametrize(("schedule", "prediction"), [(VP, "v"), (FLOW, "flow")], ids=["vp", "flow"])
@pytest.mark.parametrize("case", ORDERS)
def test_order(case, schedule, prediction):
    order, options = ORDERS[case]
    assert_order(order, case.split("-")[0], schedule, prediction, step_counts=(250, 500, 1000), **options)


def test_gamma_one_is_ddim():
    given = {"schedule": VP, "steps": 9, "prediction": "v"}
    x, (found, expected) = np.linspace(-2.0, 2.0, 5), ([], [])
    for method, options, states in (("gradient_estimation", {"gamma": 1.0}, found), ("ddim", {}, expected)):
        states.extend(trajectory(lambda x, t: np.sin(x + t), samplers.build(method, **given, **options), x))
    np.testing.assert_allclose(found, expected, rtol=1e-11)


def test_without_noise_it_is_dpmpp_2m():
    given = {"schedule": VP, "steps": 9, "prediction": "v"}
    found = samplers.build("res_multistep", **given)
    expected = samplers.build("dpmpp_2m", solver="heun", lower_order_final=False, **given)
    np.testing.assert_allclose(found.rows[:, NEW_X], expected.rows[:, NEW_X], rtol=1e-10, atol=1e-14)


def test_distribution_with_noise():
    assert_distribution("res_multistep", eta=1.0, steps=500)


def test_a_wrong_noise_coefficient_is_seen():
    assert_power("res_multistep", eta=1.0, steps=500)


@pytest.mark.parametrize("churn", [{}, {"s_churn": 2.0, "s_tmin": 0.5, "s_noise": 1.1}], ids=["plain", "churn"])
def test_heunpp2_is_its_formula(churn):
    levels, z = [9.0, 5.0, 2.0, 0.6, 0.1, 0.0], 0.3
    given = {"schedule": VE, "prediction": "sample", "sigmas": levels[:-1], "final_sigma": "zero"}
    table = samplers.build("heunpp2", **given, **churn)

    def data(y, r):
        return np.sin(y / (1.0 + r)) + 0.1 * y / (1.0 + r**2)

    y = np.linspace(-9.0, 9.0, 5)
    start = y
    for i, (low, end) in enumerate(pairwise(levels)):
        gamma = min(churn.get("s_churn", 0.0) / 5.0, math.sqrt(2.0) - 1.0) if low >= churn.get("s_tmin", 0.0) else 0.0
        r = (1.0 + gamma) * low
        y = y + math.sqrt(r**2 - low**2) * churn.get("s_noise", 1.0) * z
        if i == 0:
            start = y
        at, slopes, state = [r, *levels[i + 1 :]], [], y
        for j in range(min(3, 5 - i)):
            slopes.append((state - data(state, at[j])) / at[j])
            state = state + (at[j + 1] - at[j]) * slopes[-1]
        count = len(slopes)
        weights = [at[j] / (count * levels[0]) for j in range(1, count)]
        y = y + (end - r) * sum(w * d for w, d in zip([1.0 - sum(weights), *weights], slopes, strict=True))
    *_, found = trajectory(data, table, start, lambda _: np.full(5, z))
    np.testing.assert_allclose(found, y, rtol=1e-11, atol=1e-12)
