"""DEIS in other variables than log r, and SA-Solver that computes a prediction again at the corrected state."""

import numpy as np
import pytest
from convergence import assert_order
from interpret import trajectory
from scipy.integrate import quad
from stochastic import assert_distribution

from fastdiff import samplers, schedules
from fastdiff.ops.row import INPUTS, NEW_X
from fastdiff.samplers.deis import _time

VP = schedules.linear(1000)
VE = schedules.ve(1000, sigma_min=0.02, sigma_max=80.0)
LEVELS = [9.0, 5.0, 2.0, 0.6]


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("polynomial", ["rho", "time"])
def test_order_of_deis(polynomial, order):
    options = {"order": order, "polynomial": polynomial, "lower_order_final": False}
    assert_order(order, "deis", VP, "v", step_counts=(250, 500, 1000), **options)


def test_rho_is_ipndm_v():
    given = {"schedule": VP, "steps": 9, "prediction": "v", "spacing": "karras"}
    found = samplers.build("deis", order=3, polynomial="rho", lower_order_final=False, **given)
    expected = samplers.build("ipndm_v", order=3, **given)
    np.testing.assert_allclose(found.rows, expected.rows, rtol=1e-12)


def test_time_is_that_of_the_vp_sde_from_0_002_to_80():
    assert _time(80.0) == pytest.approx(1.0, rel=1e-12)
    assert _time(0.002) == pytest.approx(0.001, rel=1e-9)


def test_the_integrals_in_time():
    """int P_j(t(r)) dr from 2 to 0.6, P_j through t(2), t(5) and t(9), the slopes' weights of the last step."""
    given = {"schedule": VE, "prediction": "sample", "sigmas": LEVELS, "final_sigma": "last"}
    table = samplers.build("deis", order=3, polynomial="time", lower_order_final=False, **given)
    nodes = [_time(r) for r in LEVELS[2::-1]]

    def basis(j, r):
        return np.prod([(_time(r) - other) / (nodes[j] - other) for other in nodes if other != nodes[j]])

    expected = [quad(lambda r, j=j: basis(j, r), 2.0, 0.6, epsabs=1e-13)[0] for j in range(3)]
    row = dict(zip(INPUTS, table.rows[2, NEW_X], strict=True))
    # epsilon is (x - D)/r at r = 2.
    assert [-2.0 * (row["m"] + row["D"]), row["hist1"], row["hist2"]] == pytest.approx(expected, rel=1e-9)


def test_means_tend_to_the_integrals():
    given = {"schedule": VP, "steps": 8, "prediction": "v", "order": 3, "polynomial": "time"}
    exact = samplers.build("deis", **given).rows[:, NEW_X]
    errors = [np.abs(samplers.build("deis", points=n, **given).rows[:, NEW_X] - exact).max() for n in (500, 1000)]
    assert errors[0] / errors[1] == pytest.approx(2.0, abs=0.1)


def test_order_of_pece():
    options = {"tau": 0.0, "predictor_order": 3, "corrector_order": 4, "pece": True, "lower_order_final": False}
    assert_order(4, "sa_solver", VP, "v", **options)


def test_distribution_of_pece():
    assert_distribution("sa_solver", pece=True)


def test_the_second_call_is_at_the_corrected_state():
    """With the corrector's order 1, x_c = (sigma'/sigma) x + (1 - sigma'/sigma) D', D' at the predicted state."""
    options = {"tau": 0.0, "predictor_order": 1, "corrector_order": 1, "pece": True}
    given = {"schedule": VE, "prediction": "sample", "sigmas": LEVELS, "final_sigma": "last"}
    table, called = samplers.build("sa_solver", **given, **options), []

    def data(x, t):
        called.append((float(x[0]), t))
        return np.sin(x / (1.0 + t))

    x = np.array([4.0])
    *_, end = trajectory(data, table, x, lambda _: np.zeros(1))
    expected, state = [(4.0, 9.0)], 4.0
    known = np.sin(state / 10.0)
    for r, r1 in ((9.0, 5.0), (5.0, 2.0)):
        predicted = known + r1 / r * (state - known)
        state = state * r1 / r + (1.0 - r1 / r) * np.sin(predicted / (1.0 + r1))
        known = np.sin(state / (1.0 + r1))
        expected += [(predicted, r1), (state, r1)]
    np.testing.assert_allclose(called, expected, rtol=1e-12)
    np.testing.assert_allclose(end, known + 0.6 / 2.0 * (state - known), rtol=1e-12)
