"""Where the points of a grid lie, for every spacing, step count and end."""

import math

import numpy as np
import pytest

from fastdiff import samplers, schedules
from fastdiff.errors import InputError
from fastdiff.samplers import grid as grids

VP, FLOW = schedules.linear(1000), schedules.flow(1000, shift=3.0)


def grid(steps: int | None, schedule=VP, **options) -> samplers.Grid:
    return points_of(schedule, steps, **options)


def points_of(schedule: schedules.Schedule, steps: int | None, **options) -> samplers.Grid:
    return grids.build(schedule, steps, grids.GridOptions(**options))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"spacing": "trailing"}, [999, 856, 713, 570, 428, 285, 142]),
        ({"spacing": "trailing", "integer": False}, [1000 - i * 1000 / 7 - 1 for i in range(7)]),
        ({"spacing": "leading"}, [852, 710, 568, 426, 284, 142, 0]),
        ({"spacing": "leading", "steps_offset": 3}, [855, 713, 571, 429, 287, 145, 3]),
        ({"spacing": "leading", "endpoint": False}, [875, 750, 625, 500, 375, 250, 125]),
        ({"spacing": "linspace"}, [999, 832, 666, 500, 333, 166, 0]),
        ({"spacing": "linspace", "integer": False}, [999 - 166.5 * i for i in range(7)]),
        ({"spacing": "linspace", "endpoint": False}, [999, 856, 714, 571, 428, 285, 143]),
    ],
    ids=str,
)
def test_even_timesteps(options, expected):
    points = grid(7, **options)
    np.testing.assert_allclose(points.timesteps[:-1], expected, rtol=1e-12)
    if options.get("integer") is not False:
        whole = np.array(expected)
        np.testing.assert_allclose(points.alphas[:-1], VP.alphas[whole], rtol=1e-11)
        np.testing.assert_allclose(points.sigmas[:-1], VP.sigmas[whole], rtol=1e-11)
    assert (points.alphas[-1], points.sigmas[-1]) == (1.0, 0.0)


def test_karras_and_exponential():
    low, high = VP.noise_ratios[0], 80.0
    rho7 = [(high ** (1 / 7) + i / 5 * (low ** (1 / 7) - high ** (1 / 7))) ** 7 for i in range(6)]
    log = [math.exp(math.log(high) + i / 5 * (math.log(low) - math.log(high))) for i in range(6)]
    for spacing, expected in (("karras", rho7), ("exponential", log)):
        points = grid(6, spacing=spacing)
        np.testing.assert_allclose(points.noise_ratios, [*expected, 0.0], rtol=1e-12)
        np.testing.assert_allclose(VP.timestep_of(expected), points.timesteps[:-1], rtol=1e-12)
        np.testing.assert_allclose(points.alphas**2 + points.sigmas**2, 1.0, rtol=1e-14)


def test_rounded_timesteps_of_karras_leave_the_levels_alone():
    exact, rounded = grid(6, spacing="karras"), grid(6, spacing="karras", integer=True)
    assert np.array_equal(exact.sigmas, rounded.sigmas)
    assert np.array_equal(np.round(exact.timesteps), rounded.timesteps)


@pytest.mark.parametrize(
    ("options", "u"),
    [
        ({}, [1.0, 0.75, 0.5, 0.25]),
        ({"spacing": "linspace"}, [1.0, 0.667, 0.334, 0.001]),
        ({"spacing": "linspace", "endpoint": False, "sigma_min": 0.2}, [1.0, 0.8, 0.6, 0.4]),
    ],
    ids=str,
)
def test_flow_grids_shift_u(options, u):
    points = grid(4, FLOW, **options)
    t = [3 * v / (1 + 2 * v) for v in u]
    np.testing.assert_allclose(points.sigmas, [*t, 0.0], rtol=1e-12)
    np.testing.assert_allclose(points.alphas, [*(1 - v for v in t), 1.0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(points.timesteps, [*(1000 * v for v in t), 0.0], rtol=1e-12)


def test_any_shift_starts_at_pure_noise():
    for shift in np.linspace(0.3, 12.0, 400):
        points = grid(3, schedules.flow(1000, shift=float(shift)))
        assert (points.alphas[0], points.sigmas[0]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("steps", "options", "message"),
    [
        (0, {}, "steps: expected a whole number from 1 to 1000, got 0"),
        (-3, {}, "steps: expected"),
        (1001, {}, "steps: expected"),
        (2.5, {}, "steps: expected"),
        (True, {}, "steps: expected"),
        (10, {"spacing": "karass"}, "spacing: expected one of leading"),
        (10, {"spacing": "flow"}, "for a vp schedule, got 'flow'"),
        (10, {"rho": 5.0}, "rho: has no effect with spacing='trailing'"),
        (10, {"spacing": "karras", "steps_offset": 1}, "steps_offset: has no effect"),
        (10, {"spacing": "karras", "sigma_min": 5.0, "sigma_max": 1.0}, "sigma_min < sigma_max"),
        (10, {"spacing": "karras", "sigma_max": -1.0}, "sigma_max: expected a positive number"),
        (10, {"spacing": "karras", "rho": 0.0}, "rho: expected a positive number"),
        (10, {"spacing": "leading", "steps_offset": 200}, "steps_offset: the timesteps start at 1100"),
        (10, {"spacing": "linspace", "integer": False, "interpolation": "cubic"}, "interpolation: expected 'log'"),
        (10, {"final_sigma": "one"}, "final_sigma: expected one of zero, schedule"),
        (10, {"final_sigma": "last"}, "final_sigma: expected one of zero, schedule, got 'last'"),
        (10, {"shift": 3.0}, "shift: has no effect with spacing='trailing' on a vp schedule"),
        (10, {"spacing": "beta", "beta_a": 0.0}, "beta_a: expected a positive number"),
        (10, {"spacing": "align_your_steps"}, "ays_model: align_your_steps needs one of sd15, sdxl, svd"),
        (
            10,
            {"spacing": "align_your_steps", "ays_model": "sd3"},
            "ays_model: expected one of sd15, sdxl, svd, got 'sd3'",
        ),
        (None, {}, "steps: expected a whole number from 1 to 1000, got None"),
        (None, {"timesteps": [9, 5], "sigmas": [2.0, 1.0]}, "expected one of the three"),
        (None, {"timesteps": [9, 5], "spacing": "karras"}, "expected one of the three"),
        (3, {"timesteps": [9, 5]}, "steps: timesteps has 2 steps, got 3"),
        (3, {"sigmas": [2.0, 1.0, 0.0]}, "steps: sigmas has 2 steps, got 3"),
        (None, {"timesteps": [5, 9]}, "timesteps: expected falling numbers"),
        (None, {"timesteps": [9, 9]}, "timesteps: expected falling numbers"),
        (None, {"timesteps": []}, "timesteps: expected falling numbers"),
        (None, {"sigmas": [[2.0, 1.0]]}, "sigmas: expected falling numbers"),
        (None, {"sigmas": [2.0, float("nan")]}, "sigmas: expected falling numbers"),
        (None, {"sigmas": ["a"]}, "sigmas: expected falling numbers"),
        (None, {"sigmas": [2.0, -1.0]}, "sigmas: expected levels from 0 to inf"),
        (None, {"sigmas": [0.0]}, "sigmas: expected a level to start from and one to end at"),
        (None, {"sigmas": [1.0], "final_sigma": "last"}, "sigmas: expected a level to start from"),
        (None, {"timesteps": [1000, 5]}, "timesteps: the timesteps start at 1000"),
        (None, {"timesteps": [5, -1]}, "timesteps: the timesteps start at 5"),
        (None, {"timesteps": [9, 5], "rho": 2.0}, "rho: has no effect with timesteps="),
        (10, {"strength": 0.0}, "strength: expected a number above 0 and at most 1"),
        (10, {"strength": 1.1}, "strength: expected a number above 0 and at most 1"),
        (10, {"strength": 0.09}, "strength: 0.09 of 10 steps leaves none"),
        (667, {"final_sigma": "schedule"}, "do not fit between"),
        (1000, {"spacing": "leading", "endpoint": False}, "do not fit between"),
    ],
    ids=str,
)
def test_bad_grids_are_refused(steps, options, message):
    with pytest.raises(InputError, match=message):
        grid(steps, **options)


@pytest.mark.parametrize(
    ("schedule", "options", "message"),
    [
        (schedules.flow(), {"sigmas": [1.2, 0.5]}, "expected levels from 0 to 1 for a flow schedule"),
        (schedules.flow(), {"sigma_max": 2.0, "spacing": "karras"}, "expected 0 < sigma_min < sigma_max"),
        (schedules.flow(), {"shift_terminal": 1.0}, "shift_terminal: expected a number between 0 and 1"),
        (schedules.flow(), {"shift": 0.0}, "shift: expected a positive number"),
        (schedules.flow(), {"timesteps": [1001.0, 5.0]}, "timesteps: the timesteps start at 1001"),
        (schedules.edm(), {"sigmas": [math.inf, 1.0]}, "sigmas: expected levels"),
        (schedules.ve(), {"integer": True}, "integer: the schedule 've' has no whole timesteps"),
        (schedules.sub_vp_sde(), {"spacing": "align_your_steps"}, "for a sub_vp schedule, got 'align_your_steps'"),
    ],
    ids=lambda value: value.name if isinstance(value, schedules.Schedule) else str(value),
)
def test_bad_grids_of_other_schedules_are_refused(schedule, options, message):
    steps = None if "sigmas" in options or "timesteps" in options else 5
    with pytest.raises(InputError, match=message):
        points_of(schedule, steps, **options)


def test_vp_spacings_do_not_fit_flow_schedules():
    with pytest.raises(InputError, match="expected one of flow, linspace, karras, exponential, polyexponential, beta"):
        grid(10, FLOW, spacing="trailing")
