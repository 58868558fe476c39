"""Steps that do not end where the next begins, and the numbers that stand for what follows from the levels."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from fastdiff import samplers, schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import INPUTS, NEW_X
from fastdiff.samplers.problem import End, Problem

VP = schedules.linear(1000)
NOISE = NEW_X.start + INPUTS.index("noise")


def problem(ends=None, steps=6):
    grid = samplers.build("ddim", schedule=VP, steps=steps).grid
    return Problem(VP, grid, "epsilon", None, ends=ends)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("ddim", {}),
        ("ddim", {"eta": 0.6}),
        ("ddpm", {}),
        ("ddpm", {"variance": "fixed_large"}),
        ("lcm", {}),
        ("tcd", {}),
    ],
    ids=str,
)
def test_ends_at_the_next_points_change_nothing(method, options):
    whole = problem()
    ends = [End(point.timestep, point.alpha, point.sigma) for point in whole.points()[1:]]
    rows = [samplers.find(method).rows(given, **options).rows for given in (whole, replace(whole, ends=ends))]
    np.testing.assert_array_equal(*rows)


@pytest.mark.parametrize("method", ["ddim", "ddpm", "lcm", "ddim_inverse"])
def test_a_step_is_the_same_alone_and_among_others(method):
    """Each of them ends two points on: rows of one table, and of tables with one row."""
    points = problem().points()
    skipping = [End(point.timestep, point.alpha, point.sigma) for point in [*points[2:], points[-1]]]
    table = samplers.find(method).rows(problem(skipping))
    for index in range(5):
        start = points[index]
        grid = samplers.Grid(*(np.array([value, 0.0]) for value in (start.timestep, start.alpha, start.sigma)))
        alone = samplers.find(method).rows(replace(problem(skipping[index : index + 1]), grid=grid))
        np.testing.assert_array_equal(alone.rows[0], table.rows[index])


def test_a_given_variance_of_the_forward_process_is_that_of_the_noise():
    points = problem().points()
    ends = [End(point.timestep, point.alpha, point.sigma, 0.04) for point in points[1:]]
    rows = samplers.find("ddpm").rows(problem(ends), variance="fixed_large").rows
    np.testing.assert_allclose(rows[:-1, NOISE], 0.2)
    rows = samplers.find("ddim").rows(problem(ends), eta=1.0).rows
    expected = [0.2 * end.sigma / start.sigma for start, end in pairwise(points[:-1])]
    np.testing.assert_allclose(rows[:-1, NOISE], expected)


def test_a_given_factor_of_the_forward_process_is_that_of_the_state():
    points = problem().points()
    ends = [End(point.timestep, point.alpha, point.sigma, None, 0.5) for point in points[1:]]
    rows = samplers.find("ddpm").rows(problem(ends)).rows
    expected = [0.5 * (end.sigma / start.sigma) ** 2 for start, end in pairwise(points)]
    np.testing.assert_allclose(rows[:, NEW_X.start], expected)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_noise_in_the_step_to_the_data(variance):
    """The forward process adds sigma^2 from the data to the last point; no step from timestep 0 has any."""
    for timesteps, noisy in (((800.0, 300.0), True), ((800.0, 0.0), False)):
        options = {"schedule": VP, "timesteps": timesteps, "variance": variance}
        quiet = samplers.build("ddpm", **options)
        table = samplers.build("ddpm", **options, final_noise=True)
        assert quiet.rows[-1, NOISE] == 0.0
        sigma = quiet.grid.sigmas[-2] if noisy and variance == "fixed_large" else 0.0
        np.testing.assert_allclose(table.rows[-1, NOISE], sigma)
        np.testing.assert_array_equal(table.rows[:-1], quiet.rows[:-1])
    with pytest.raises(InputError, match="final_noise"):
        samplers.build("ddpm", schedule=VP, steps=5, final_noise=1)


def test_given_points_beyond_are_those_that_eta_gives():
    table = samplers.build("tcd", schedule=VP, steps=4, eta=0.3)
    ends = table.grid.timesteps[1:-1]
    alphas, sigmas = VP.at(np.floor(np.round(0.7 * ends, 6)))
    given = samplers.find("tcd").rows(Problem(VP, table.grid, "epsilon", None), beyond=[*(sigmas / alphas), 0.0])
    np.testing.assert_allclose(given.rows, table.rows, rtol=1e-9, atol=1e-12)
