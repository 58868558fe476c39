"""Where the points of a grid lie, for every spacing, step count and end."""

import math

import numpy as np
import pytest

from fastdiff import samplers, schedules
from fastdiff.errors import InputError

VP, FLOW = schedules.linear(1000), schedules.flow(1000, shift=3.0)


def grid(steps: int, schedule=VP, **options) -> samplers.Grid:
    prediction = "sample"
    return samplers.build("ddim", schedule=schedule, steps=steps, prediction=prediction, **options).grid


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


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras", "exponential"])
@pytest.mark.parametrize("final_sigma", ["zero", "schedule"])
def test_every_step_count_has_falling_levels(spacing, final_sigma):
    # Whole trailing timesteps reach 0, the schedule's own end, from 667 steps on.
    most = 666 if (spacing, final_sigma) == ("trailing", "schedule") else 999
    for steps in [*range(1, 60), 333, 499, 500, 501, 600, most]:
        points = grid(steps, spacing=spacing, final_sigma=final_sigma)
        assert points.steps == steps
        assert (np.diff(points.noise_ratios) < 0).all()
        assert points.sigmas[-1] == (0.0 if final_sigma == "zero" else pytest.approx(VP.sigmas[0], rel=1e-12))
        t = points.timesteps[:-1]
        assert t.min() >= 0
        assert t.max() <= 999


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras", "exponential"])
def test_as_many_steps_as_training(spacing):
    points = grid(1000, spacing=spacing)
    if spacing not in ("karras", "exponential"):
        assert points.timesteps[:-1].tolist() == list(range(999, -1, -1))
    assert (np.diff(points.noise_ratios) < 0).all()


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
        (667, {"final_sigma": "schedule"}, "do not fit between"),
        (1000, {"spacing": "leading", "endpoint": False}, "do not fit between"),
    ],
    ids=str,
)
def test_bad_grids_are_refused(steps, options, message):
    with pytest.raises(InputError, match=message):
        grid(steps, **options)


def test_vp_spacings_do_not_fit_flow_schedules():
    with pytest.raises(InputError, match="expected one of flow, linspace, karras, exponential, polyexponential, beta"):
        grid(10, FLOW, spacing="trailing")
