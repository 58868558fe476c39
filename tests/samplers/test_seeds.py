"""SEEDS: its order without noise, the noise that it adds, and the distribution that it leaves."""

import math

import numpy as np
import pytest
from convergence import assert_order
from interpret import trajectory
from stochastic import assert_distribution, assert_power

from fastdiff import samplers, schedules
from fastdiff.errors import InputError

VP, FLOW = schedules.linear(1000), schedules.flow(1000, shift=2.0)
CASES = {
    "seeds_2": {},
    "seeds_2-heun": {"solver": "heun", "r": 0.4},
    "seeds_2-exponential_heun": {"solver": "heun", "r": 1.0},
    "seeds_3": {},
}


@pytest.mark.parametrize(("schedule", "prediction"), [(VP, "v"), (FLOW, "flow")], ids=["vp", "flow"])
@pytest.mark.parametrize("case", CASES)
def test_order_without_noise(case, schedule, prediction):
    method = case.split("-")[0]
    assert_order(samplers.methods()[method].order, method, schedule, prediction, eta=0.0, **CASES[case])


@pytest.mark.parametrize("case", CASES)
def test_distribution(case):
    assert_distribution(case.split("-")[0], **CASES[case])


@pytest.mark.parametrize("method", ["seeds_2", "seeds_3"])
def test_a_wrong_noise_coefficient_is_seen(method):
    assert_power(method)


@pytest.mark.parametrize(
    ("method", "options", "parts"),
    [("seeds_2", {"r": 0.3}, (0.3, 0.7)), ("seeds_2", {"r": 1.0}, (1.0,)), ("seeds_3", {}, (1 / 3, 1 / 3, 1 / 3))],
)
def test_the_noises_of_a_step_are_those_of_its_parts(method, options, parts):
    """With D = 0 a step is x' = (sigma'/sigma) e^(-eta h) x + noise, the parts' noise decayed to the end."""
    eta, s_noise, levels = 0.7, 1.3, (4.0, 1.5)
    schedule = schedules.ve(1000, sigma_min=0.02, sigma_max=80.0)
    given = {"schedule": schedule, "prediction": "sample", "sigmas": levels, "final_sigma": "last"}
    table = samplers.build(method, eta=eta, s_noise=s_noise, **given, **options)
    h = math.log(levels[0] / levels[1])
    found = []
    for drawn in range(len(table)):
        noise = [float(j == drawn) for j in range(len(table))]
        *_, end = trajectory(lambda x, t: 0.0 * x, table, np.zeros(1), lambda j, z=noise: np.full(1, z[j]))
        found.append(float(end[0]))
    left = [math.fsum(parts[j + 1 :]) for j in range(len(parts))]
    expected = [
        levels[1] * s_noise * math.exp(-eta * rest * h) * math.sqrt(-math.expm1(-2.0 * eta * part * h))
        for part, rest in zip(parts, left, strict=True)
    ]
    # With r = 1 the second row's noise has no time left.
    assert found == pytest.approx(expected + [0.0] * (len(found) - len(expected)), rel=1e-12)


@pytest.mark.parametrize(
    ("method", "option"), [("seeds_2", {"r": 0.0}), ("seeds_3", {"r1": 0.7}), ("seeds_3", {"r2": 1.0})]
)
def test_inner_points_lie_inside(method, option):
    with pytest.raises(InputError, match=rf"^{method}: {next(iter(option))[0]}.*: expected"):
        samplers.build(method, schedule=VP, steps=5, prediction="v", **option)
