"""ER-SDE: its order, its integrals, its limits, and the distribution that it leaves."""

import numpy as np
import pytest
from convergence import assert_order
from interpret import trajectory
from stochastic import assert_distribution, assert_power

from fastdiff import samplers, schedules
from fastdiff.ops.row import NEW_X
from fastdiff.samplers.er_sde import SCALINGS

VP, FLOW = schedules.linear(1000), schedules.flow(1000, shift=2.0)
VE = schedules.ve(1000, sigma_min=0.02, sigma_max=80.0)


@pytest.mark.parametrize(("schedule", "prediction"), [(VP, "v"), (FLOW, "flow")], ids=["vp", "flow"])
@pytest.mark.parametrize(("stages", "order"), [(1, 1), (2, 2), (3, 2)])
def test_order_without_noise(stages, order, schedule, prediction):
    counts = (250, 500, 1000) if stages == 3 else (160, 320, 640)
    assert_order(order, "er_sde", schedule, prediction, step_counts=counts, max_stage=stages, scaling="ode")


@pytest.mark.parametrize("options", [{}, {"scaling": "sde"}, {"max_stage": 1}], ids=["er", "sde", "one_stage"])
def test_distribution(options):
    assert_distribution("er_sde", **options)


def test_a_wrong_noise_coefficient_is_seen():
    assert_power("er_sde")


def test_one_stage_on_the_flow_of_probability_is_ddim():
    given = {"schedule": VP, "steps": 9, "prediction": "v"}
    table = samplers.build("er_sde", max_stage=1, scaling="ode", **given)
    other = samplers.build("ddim", **given)
    x, z = np.linspace(-2.0, 2.0, 5), np.zeros(5)
    found, expected = ([*trajectory(lambda x, t: np.sin(x + t), made, x, lambda _: z)][-1] for made in (table, other))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_reverse_sde_in_one_stage_is_that_of_dpm_solver():
    given = {"schedule": VP, "steps": 9, "prediction": "v"}
    table = samplers.build("er_sde", max_stage=1, scaling="sde", **given)
    other = samplers.build("dpmpp_2m_sde", order=1, **given)
    np.testing.assert_allclose(table.rows[:, NEW_X], other.rows[:, NEW_X], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("scaling", ["er", "sde", lambda r: 1.0 + r**2], ids=["er", "sde", "function"])
def test_a_parabola_is_integrated_exactly(scaling):
    """With D = r^2 at three equally distant levels D^1 is the slope half a step back and D^2 is 2."""
    levels = (6.0, 5.0, 4.0, 3.0)
    quotient = SCALINGS[scaling] if isinstance(scaling, str) else scaling
    given = {"schedule": VE, "prediction": "sample", "sigmas": levels, "final_sigma": "last"}
    table = samplers.build("er_sde", scaling=scaling, s_noise=0.0, **given)
    r = np.linspace(3.0, 4.0, 200_001)
    phi, scale = r * np.array([quotient(v) for v in r.tolist()]), 3.0 * quotient(3.0)
    zeroth, first = (scale * np.trapezoid((r - 4.0) ** n / phi, r) for n in (0, 1))
    slope, bend = (16.0 - 25.0) / -1.0, 2.0
    c = quotient(3.0) / quotient(4.0)
    expected = {"x": 3.0 / 4.0 * c, "D": 1.0 - 3.0 / 4.0 * c}
    total = expected["D"] * 16.0 + (-1.0 + zeroth) * slope + (0.5 + first) * bend
    row = dict(zip(("x", "m", "D", "anchor", "hist1", "hist2", "hist3", "noise"), table.rows[2, NEW_X], strict=True))
    assert row["x"] == pytest.approx(expected["x"], rel=1e-12)
    assert row["D"] * 16.0 + row["hist1"] * 25.0 + row["hist2"] * 36.0 == pytest.approx(total, rel=1e-9)


def test_sums_tend_to_the_integrals():
    given = {"schedule": VP, "steps": 12, "prediction": "v"}
    exact = samplers.build("er_sde", **given).rows[:, NEW_X]
    distance = [np.abs(samplers.build("er_sde", points=n, **given).rows[:, NEW_X] - exact).max() for n in (200, 400)]
    assert distance[0] / distance[1] == pytest.approx(2.0, abs=0.1)
