"""The spacings beyond DDPM's own, given points, and every step count of every schedule."""

import math

import numpy as np
import pytest
from scipy.stats import beta

from fastdiff import schedules
from fastdiff.samplers import Grid, grid
from fastdiff.samplers.grid import GridOptions
from fastdiff.samplers.placement import GIVEN, SPACINGS

LATENT = schedules.scaled_linear()
ZERO = schedules.zero_terminal_snr(LATENT)
SCHEDULES = [
    schedules.linear(),
    LATENT,
    schedules.cosine(),
    ZERO,
    schedules.flow(shift=3.0),
    schedules.ve(),
    schedules.edm(),
    schedules.vp_sde(),
    schedules.sub_vp_sde(),
    schedules.crash(),
]
EVERY = [(schedule, name) for schedule in SCHEDULES for name in SPACINGS[schedule.kind] if name not in GIVEN]
pytestmark = pytest.mark.filterwarnings("error:.*encountered:RuntimeWarning")


def build(schedule: schedules.Schedule, steps: int | None = None, **options) -> Grid:
    return grid.build(schedule, steps, GridOptions(**options))


@pytest.mark.parametrize(("schedule", "spacing"), EVERY, ids=lambda v: v if isinstance(v, str) else v.name)
def test_every_step_count_has_falling_levels(schedule, spacing):
    needed = {"align_your_steps": {"ays_model": "sd15"}, "lcm": {"original_steps": schedule.steps}}
    # The quantiles cost more than all else; what differs between schedules is the two ends.
    stride = 37 if spacing == "beta" and schedule is not LATENT else 1
    for steps in range(1, schedule.steps + 1, stride):
        points = build(schedule, steps, spacing=spacing, **needed.get(spacing, {}))
        ratios, t = points.noise_ratios, points.timesteps
        assert points.steps == steps
        assert (ratios[1:] < ratios[:-1]).all()
        assert (t[1:-1] < t[:-2]).all()
        assert t[-1] <= t[-2]
        assert np.isfinite(t).all()


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras", "exponential", "logsnr", "beta"])
def test_step_counts_that_end_at_the_schedules_end(spacing):
    # Whole trailing timesteps reach 0, the schedule's own end, from 667 steps on; the others leave it for the end.
    most = 666 if spacing == "trailing" else 999
    for steps in range(1, most + 1):
        points = build(LATENT, steps, spacing=spacing, final_sigma="schedule")
        assert (np.diff(points.noise_ratios) < 0).all()
        assert points.sigmas[-1] == pytest.approx(LATENT.sigmas[0], rel=1e-12)
        assert points.timesteps[-1] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("schedule", [LATENT, ZERO], ids=lambda s: s.name)
def test_as_many_steps_as_training(schedule, spacing):
    points = build(schedule, 1000, spacing=spacing)
    assert points.timesteps[:-1].tolist() == list(range(999, -1, -1))
    np.testing.assert_allclose(points.alphas[:-1], schedule.alphas[::-1], rtol=1e-11, atol=1e-16)


def test_log_snr_ends_at_the_clean_end_and_exponential_calls_the_network_there():
    high, low = LATENT.noise_ratios[[-1, 0]]
    log = build(LATENT, 5, spacing="logsnr")
    np.testing.assert_allclose(np.diff(np.log(log.noise_ratios)), [math.log(low / high) / 5] * 5, rtol=1e-12)
    assert log.noise_ratios[[0, -1]] == pytest.approx([high, low], rel=1e-13)
    other = build(LATENT, 6, spacing="exponential")
    np.testing.assert_allclose(other.noise_ratios[:-1], log.noise_ratios, rtol=1e-12)
    assert other.noise_ratios[-1] == 0.0


@pytest.mark.parametrize("rho", [None, 0.5, 2.0])
def test_polyexponential(rho):
    points = build(LATENT, 6, spacing="polyexponential", rho=rho, sigma_min=0.1, sigma_max=10.0)
    expected = [0.1 * 100 ** ((1 - i / 5) ** (rho or 1.0)) for i in range(6)]
    np.testing.assert_allclose(points.noise_ratios, [*expected, 0.0], rtol=1e-12)


@pytest.mark.parametrize(("a", "b"), [(None, None), (0.5, 2.0)])
def test_beta_levels_are_quantiles(a, b):
    points = build(LATENT, 9, spacing="beta", beta_a=a, beta_b=b, sigma_min=0.1, sigma_max=10.0)
    quantiles = beta.ppf(1 - np.arange(9) / 8, a or 0.6, b or 0.6)
    np.testing.assert_allclose(points.noise_ratios[:-1], 0.1 + 9.9 * quantiles, rtol=1e-12)
    shifted = build(schedules.flow(shift=3.0), 9, spacing="beta", beta_a=a, beta_b=b)
    low = 3 * 0.001 / (1 + 2 * 0.001)
    np.testing.assert_allclose(shifted.sigmas[:-1], low + (1 - low) * quantiles, rtol=1e-12)


@pytest.mark.parametrize("steps", [5, 20])
def test_align_your_steps_at_other_counts(steps):
    known = np.array([700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002])
    options = {"spacing": "align_your_steps", "ays_model": "svd", "final_sigma": "schedule"}
    points = build(schedules.edm(sigma_max=700.0), steps, **options)
    if steps == 5:
        expected = known[::2]
    else:
        expected = np.insert(known, range(1, 11), np.sqrt(known[1:] * known[:-1]))
    np.testing.assert_allclose(points.noise_ratios, expected, rtol=1e-12)
    np.testing.assert_allclose(points.timesteps, np.log(expected) / 4, rtol=1e-12)


def test_edm_is_the_grid_of_karras():
    points = build(schedules.edm(), 18)
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    np.testing.assert_allclose(points.sigmas, [*expected, 0.0], rtol=1e-12)
    np.testing.assert_allclose(points.timesteps[:-1], np.log(expected) / 4, rtol=1e-12)
    assert (points.alphas == 1.0).all()


def test_song_sdes_are_even_in_time():
    ve = build(schedules.ve(), 5, spacing="linspace")
    np.testing.assert_allclose(ve.sigmas, [50.0, *(0.01 * 5000 ** (1 - i / 4) for i in (1, 2, 3, 4)), 0.0], rtol=1e-12)
    np.testing.assert_allclose(ve.timesteps[:-1], ve.sigmas[:-1], rtol=1e-14)
    vp = build(schedules.vp_sde(), 5, spacing="linspace")
    np.testing.assert_allclose(vp.timesteps[:-1], 999 * np.linspace(1.0, 1e-3, 5), rtol=1e-12)
    trailing = build(schedules.ve(), 4, spacing="trailing")
    np.testing.assert_allclose(schedules.ve().time(trailing.timesteps[:-1]) * 999, [999, 749, 499, 249], rtol=1e-12)


def test_ends_of_linspace_are_levels():
    points = build(LATENT, 5, spacing="linspace", integer=False, sigma_min=0.1, sigma_max=10.0)
    assert points.noise_ratios[[0, 4]] == pytest.approx([10.0, 0.1], rel=1e-11)
    np.testing.assert_allclose(np.diff(points.timesteps[:-1], n=2), 0.0, atol=1e-9)
    ended = build(LATENT, 5, spacing="linspace", integer=False, sigma_min=0.1, final_sigma="schedule")
    assert ended.noise_ratios[-1] == pytest.approx(0.1, rel=1e-12)
    sde = build(schedules.sub_vp_sde(), 5, spacing="linspace", sigma_min=0.1, sigma_max=10.0)
    assert sde.noise_ratios[[0, 4]] == pytest.approx([10.0, 0.1], rel=1e-11)
    np.testing.assert_allclose(np.diff(sde.timesteps[:-1], n=2), 0.0, atol=1e-9)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
def test_a_schedule_without_signal_starts_without_signal(spacing):
    points = build(ZERO, 7, spacing=spacing)
    assert (points.alphas[0], points.sigmas[0], points.noise_ratios[0]) == (0.0, 1.0, np.inf)
    for other in ("karras", "exponential", "logsnr", "beta"):
        assert build(ZERO, 7, spacing=other).noise_ratios[0] == pytest.approx(80.0, rel=1e-13)


def test_only_levels_of_vanishing_signal_are_capped():
    assert build(schedules.ve(sigma_max=1348.0), 7).noise_ratios[0] == pytest.approx(1348.0, rel=1e-13)


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s.name != "flow"], ids=lambda s: s.name)
def test_given_levels(schedule):
    levels = [9.0, 3.0, 0.5]
    for given in (levels, [*levels, 0.0], np.array(levels)):
        points = build(schedule, sigmas=given)
        np.testing.assert_allclose(points.noise_ratios, [*levels, 0.0], rtol=1e-14)
        np.testing.assert_allclose(points.timesteps, schedule.timestep_of([*levels, 0.0]), rtol=1e-14)
    last = build(schedule, 2, sigmas=levels, final_sigma="last")
    np.testing.assert_allclose(last.noise_ratios, levels, rtol=1e-14)
    clean = build(schedule, 3, sigmas=[*levels, 0.0], final_sigma="schedule")
    np.testing.assert_allclose(clean.noise_ratios, [*levels, schedule.noise_ratios[0]], rtol=1e-12)


def test_given_levels_may_start_without_signal():
    points = build(ZERO, sigmas=[np.inf, 3.0])
    assert points.noise_ratios[0] == np.inf
    assert points.timesteps[0] == 999


def test_given_flow_levels():
    points = build(schedules.flow(shift=3.0), sigmas=[1.0, 0.5])
    assert points.sigmas.tolist() == [1.0, 0.5, 0.0]
    assert points.timesteps.tolist() == [1000.0, 500.0, 0.0]
    assert build(schedules.flow(), sigmas=[1.0, 0.5], shift=3.0).sigmas.tolist() == [1.0, 0.75, 0.0]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_given_timesteps(schedule):
    t = schedule.timesteps[[999, 400, 3]].tolist()
    points = build(schedule, timesteps=t)
    assert points.timesteps[:-1].tolist() == t
    np.testing.assert_allclose(points.sigmas, [*schedule.sigmas[[999, 400, 3]], 0.0], rtol=1e-11)
    assert points.alphas[-1] == 1.0
    last = build(schedule, timesteps=t, final_sigma="last")
    assert (last.steps, last.sigmas[-1]) == (2, points.sigmas[2])
    clean = build(schedule, timesteps=t, final_sigma="schedule")
    assert clean.sigmas[-1] == schedule.sigmas[0]


@pytest.mark.parametrize(("strength", "kept"), [(1.0, 10), (0.75, 7), (0.1, 1)])
def test_strength_keeps_the_last_steps(strength, kept):
    for options in ({"spacing": "karras"}, {"sigmas": [*range(10, 0, -1)]}):
        whole, part = build(LATENT, 10, **options), build(LATENT, 10, strength=strength, **options)
        assert (part.steps, part.skipped, whole.skipped) == (kept, 10 - kept, 0)
        for field in ("timesteps", "alphas", "sigmas"):
            assert getattr(part, field).tolist() == getattr(whole, field)[-kept - 1 :].tolist()


def test_terminal_stretches_all_but_pure_noise():
    points = build(schedules.flow(shift=2.0), 4, shift_terminal=0.1)
    t = np.array([2 * u / (1 + u) for u in (1.0, 0.75, 0.5, 0.25)])
    np.testing.assert_allclose(points.sigmas[:-1], 1 - (1 - t) * 0.9 / (1 - t[-1]), rtol=1e-12)
    assert points.sigmas[3] == pytest.approx(0.1, rel=1e-12)
    assert build(schedules.flow(), 1, shift_terminal=0.1).sigmas.tolist() == [1.0, 0.0]


def test_beta_without_scipy_says_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(grid.InputError, match="pip install scipy"):
        build(LATENT, 5, spacing="beta")
