"""Options of a grid that change its numbers: each against its closed form, beside what it is without."""

import numpy as np
import pytest

from fastdiff import schedules
from fastdiff.samplers import Grid, grid
from fastdiff.samplers.grid import GridOptions

LATENT, FLOW = schedules.scaled_linear(), schedules.flow(shift=3.0)


def build(schedule: schedules.Schedule, steps: int | None = None, **options) -> Grid:
    return grid.build(schedule, steps, GridOptions(**options))


@pytest.mark.parametrize("interpolation", [None, "log", "linear"])
@pytest.mark.parametrize(
    "options",
    [
        {"spacing": "linspace", "steps": 7},
        {"spacing": "trailing", "steps": 7},
        {"spacing": "leading", "steps": 7, "endpoint": False},
        {"timesteps": [900.5, 300.25, 7.75]},
    ],
    ids=str,
)
def test_levels_between_training_timesteps(options, interpolation):
    whole = {} if "timesteps" in options else {"integer": False}
    points = build(LATENT, **options, **whole, interpolation=interpolation)
    t, ratios = points.timesteps[:-1], LATENT.noise_ratios
    low = np.floor(t).astype(int)
    high = np.minimum(low + 1, 999)
    part = t - low
    if options.get("spacing") != "leading":
        assert (part > 0.0).any()
    if interpolation == "linear":
        expected = (1.0 - part) * ratios[low] + part * ratios[high]
    else:
        expected = ratios[low] ** (1.0 - part) * ratios[high] ** part
    np.testing.assert_allclose(points.noise_ratios[:-1], expected, rtol=1e-10)


def test_both_parameters_of_beta_count():
    levels = [build(LATENT, 6, spacing="beta", beta_a=a, beta_b=b).noise_ratios for a, b in ((0.5, 0.9), (0.9, 0.5))]
    assert np.abs(levels[0] - levels[1]).max() > 0.1


def test_whole_timesteps_of_given_levels():
    for schedule, levels in ((LATENT, [9.0, 3.0, 0.5]), (FLOW, [0.90013, 0.5004, 0.1007])):
        exact, whole = (build(schedule, sigmas=levels, integer=integer) for integer in (None, True))
        assert whole.timesteps.tolist() == np.round(exact.timesteps).tolist()
        assert whole.timesteps.tolist() != exact.timesteps.tolist()
        np.testing.assert_array_equal(whole.sigmas, exact.sigmas)


@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta", "linspace"])
def test_ends_of_a_flow_are_shifted(spacing):
    """The range is given in u, and a last step to the schedule's end stops at its shifted one."""
    points = build(FLOW, 5, spacing=spacing, sigma_min=0.05, sigma_max=0.9, final_sigma="schedule")
    assert points.sigmas[[0, -1]] == pytest.approx([3 * u / (1 + 2 * u) for u in (0.9, 0.05)], rel=1e-12)
    moved = build(FLOW, 5, spacing=spacing, sigma_min=0.05, sigma_max=0.9, final_sigma="schedule", shift=2.0)
    assert moved.sigmas[[0, -1]] == pytest.approx([2 * u / (1 + u) for u in (0.9, 0.05)], rel=1e-12)


@pytest.mark.parametrize("final", ["zero", "schedule"])
@pytest.mark.parametrize("strength", [None, 0.5])
@pytest.mark.parametrize("schedule", [LATENT, FLOW], ids=lambda s: s.name)
def test_distilled_timesteps(schedule, strength, final):
    """k T / original_steps for k = 1 ... available, evenly picked from the noisiest; the first timestep is 1."""
    options = {"spacing": "lcm", "original_steps": 60, "strength": strength, "final_sigma": final}
    points = build(schedule, 4, **options)
    available = 60 if strength is None else 30
    k = 16 * (available - np.arange(4) * available // 4)  # 1000 // 60 = 16
    if schedule.kind == "flow":
        np.testing.assert_allclose(points.sigmas[:-1], 3 * (k / 1000) / (1 + 2 * (k / 1000)), rtol=1e-12)
    else:
        assert points.timesteps[:-1].tolist() == (k - 1).tolist()
    assert points.sigmas[-1] == (0.0 if final == "zero" else schedule.sigmas[0])


@pytest.mark.parametrize("schedule", [LATENT, FLOW], ids=lambda s: s.name)
def test_given_levels_end_where_they_say(schedule):
    high = 0.9 if schedule.kind == "flow" else 9.0
    clean = (schedule.sigmas if schedule.kind == "flow" else schedule.noise_ratios)[0]

    def end(levels: list[float], final: str | None) -> float:
        points = build(schedule, sigmas=levels, final_sigma=final)
        return float((points.sigmas if schedule.kind == "flow" else points.noise_ratios)[-1])

    assert end([high, 0.3, 0.0], None) == end([high, 0.3], None) == 0.0
    assert end([high, 0.3, 0.0], "schedule") == pytest.approx(clean, rel=1e-12)
    assert end([high, 0.3], "schedule") == pytest.approx(clean, rel=1e-12)
    assert end([high, 0.3], "last") == pytest.approx(0.3, rel=1e-12)
    assert end([high, 0.3, 0.0], "last") == 0.0


def test_flow_steps_may_end_at_the_schedules_shifted_end():
    assert build(FLOW, 5, final_sigma="schedule").sigmas[-1] == pytest.approx(0.003 / 1.002, rel=1e-12)
    assert build(FLOW, 5, final_sigma="schedule", shift=2.0).sigmas[-1] == pytest.approx(0.002 / 1.001, rel=1e-12)


def test_an_offset_leaves_the_schedules_end_to_the_last_step():
    """The end of the range is a point of its own unless the final point is the same."""
    for offset, expected in ((1, [801, 601, 401, 201, 1, 0]), (0, [830, 664, 498, 332, 166, 0])):
        points = build(LATENT, 5, spacing="leading", steps_offset=offset, final_sigma="schedule")
        np.testing.assert_allclose(points.timesteps, expected, atol=1e-9)


@pytest.mark.parametrize("schedule", [schedules.cosine(), schedules.sub_vp_sde()], ids=lambda s: s.name)
def test_levels_start_where_signal_is_left(schedule):
    assert schedule.noise_ratios[-1] > 80.0
    assert build(schedule, 5, spacing="karras").noise_ratios[0] == pytest.approx(80.0, rel=1e-12)
