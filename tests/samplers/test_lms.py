"""The linear multistep method against Gauss-Legendre integrals, k-diffusion and diffusers."""

import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from convergence import assert_graded_order, assert_order
from diffusers_peer import SCHEDULES, assert_parity, scheduler_for, table_for
from interpret import trajectory
from k_diffusion_steps import SCHEDULE as VE
from k_diffusion_steps import assert_parity as assert_k_parity
from mixture import Mixture

from fastdiff import samplers, schedules
from fastdiff.errors import InputError
from fastdiff.samplers.grid import GridOptions, build
from fastdiff.samplers.lms import lms, quadrature, slope_rounding
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.terms import ADAMS_BASHFORTH, lagrange_weights

VP, MIXTURE = schedules.linear(1000), Mixture()
PROBLEM = Problem(VP, build(VP, 6, GridOptions(spacing="karras")), "epsilon", None)
ABSCISSAS, GAUSS = np.polynomial.legendre.leggauss(4)


def integral(nodes, j, low, high):
    """Of the Lagrange polynomial to node j; four Gauss points are exact up to degree 7."""
    tau = 0.5 * (high + low) + 0.5 * (high - low) * ABSCISSAS
    others = [node for k, node in enumerate(nodes) if k != j]
    values = np.prod([(tau - node) / (nodes[j] - node) for node in others], axis=0) * np.ones_like(tau)
    return 0.5 * (high - low) * float(GAUSS @ values)


def loop(levels, y, order):
    states, slopes = [], []
    for i, (r, r1) in enumerate(pairwise(levels)):
        slopes = [(y - MIXTURE.denoise(y, 1.0, r)) / r, *slopes[: order - 1]]
        nodes = [levels[i - j] for j in range(len(slopes))]
        y = y + sum(integral(nodes, j, r, r1) * d for j, d in enumerate(slopes))
        states.append(y)
    return states


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("steps", [1, 2, 3, 12])
@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_against_a_loop(order, steps, prediction):
    table = samplers.build("lms", schedule=VP, steps=steps, prediction=prediction, order=order)
    y = table.init_level[1] * np.random.default_rng(0).standard_normal(30)
    found = trajectory(MIXTURE.denoiser(VP, prediction), table, y)
    for ours, right in zip(found, loop(table.grid.noise_ratios, y, order), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-9, atol=1e-9)


def test_clipped_slopes_come_from_the_clipped_data():
    """y' = y + (r' - r)(1.5 d_0 - 0.5 d_1) on equal steps, d = (y - clip(D))/r."""
    table = samplers.build("lms", schedule=VE, prediction="sample", sigmas=[3.0, 2.0, 1.0], clip=0.5, order=2)
    y, outputs = np.array([4.0, -1.0]), iter([np.array([2.0, 0.3]), np.array([-3.0, 0.1]), np.array([0.2, 0.2])])
    first, second, _ = trajectory(lambda *_: next(outputs), table, y)
    d1 = (y - np.array([0.5, 0.3])) / 3.0
    np.testing.assert_allclose(first, y - d1, rtol=1e-12)
    d0 = (first - np.array([-0.5, 0.1])) / 2.0
    np.testing.assert_allclose(second, first - (1.5 * d0 - 0.5 * d1), rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_weights_of_equal_steps_are_adams_and_bashforths(order):
    weights = lagrange_weights([5.0, 6.0, 7.0, 8.0][:order], 4.0)
    assert weights == pytest.approx(ADAMS_BASHFORTH[order - 1], rel=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_order_of_convergence(order):
    assert_graded_order(order, "lms", VP, "v", order=order)
    assert samplers.methods()["lms"].order == 4


def test_order_2_needs_no_short_first_step():
    """The first step's error is of the second order, too."""
    assert_order(2, "lms", VP, "v", order=2)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_diffusers(schedule, prediction):
    for steps in (2, 3, 7, 50):
        scheduler = scheduler_for("lms", schedule, prediction)
        assert_parity(table_for("lms", scheduler, prediction, steps), scheduler)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_diffusers_orders(order):
    scheduler = scheduler_for("lms", "scaled_linear", "epsilon")
    assert_parity(table_for("lms", scheduler, "epsilon", 12, order=order), scheduler, order=order)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"timestep_spacing": "trailing"}, {"spacing": "trailing", "integer": True}),
        (
            {"timestep_spacing": "leading", "steps_offset": 1},
            {"spacing": "leading", "integer": True, "steps_offset": 1, "initial": "unit"},
        ),
        ({"use_karras_sigmas": True}, {"spacing": "karras", "interpolation": None, "integer": None}),
        ({"use_exponential_sigmas": True}, {"spacing": "exponential", "interpolation": None, "integer": None}),
    ],
    ids=str,
)
def test_diffusers_configuration(config, options):
    for steps in (2, 12):
        scheduler = scheduler_for("lms", "scaled_linear", "v", **config)
        assert_parity(table_for("lms", scheduler, "v", steps, **options), scheduler)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_k_diffusion(order):
    grid = samplers.build("euler", schedule=VE, steps=12, prediction="sample", spacing="karras").grid
    assert_k_parity("lms", "lms", torch.from_numpy(grid.sigmas).float(), their={"order": order}, order=order)


NEAR = (0.03, 0.0301, 0.0302, 0.0303)


def test_integrals_in_float64_are_exact():
    nodes = [7.0, 9.0, 12.0, 16.0]
    found = [quadrature(tuple(nodes), 6.0, j, "float64") for j in range(4)]
    np.testing.assert_allclose(found, [integral(nodes, j, 7.0, 6.0) for j in range(4)], rtol=1e-12)
    exact, made = (lms(PROBLEM, integrals=integrals).rows for integrals in ("exact", "float64"))
    np.testing.assert_allclose(made, exact, rtol=1e-9, atol=1e-9)


def test_integrals_in_float32_keep_the_rounding_of_near_levels():
    exact, *found = (
        np.array([quadrature(NEAR, 0.0299, j, precision) for j in range(4)]) for precision in ("float64", "float32")
    )
    assert 1e-5 < np.abs(found[0] / exact - 1.0).max() < 0.1


def test_integrals_without_scipy_are_exact(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    for j, weight in enumerate(lagrange_weights(NEAR, 0.0299)):
        assert quadrature.__wrapped__(NEAR, 0.0299, j, "float32") == pytest.approx(weight * (0.0299 - NEAR[0]))


def test_slope_rounding_of_one_step():
    """(r - r') sqrt(1 + r^2)/r / sqrt(1 + r'^2)."""
    assert slope_rounding([3.0, 1.0], 0, 4, "float64") == pytest.approx(2.0 * 10.0**0.5 / 3.0 / 2.0**0.5)


def test_bad_integrals_are_refused():
    with pytest.raises(InputError, match="lms: integrals"):
        lms(PROBLEM, integrals="float8")


@pytest.mark.parametrize("order", [0, 5, 2.0, True])
def test_bad_orders_are_refused(order):
    with pytest.raises(InputError, match="lms: order: expected a whole number from 1 to 4"):
        samplers.build("lms", schedule=VP, steps=5, prediction="v", order=order)
