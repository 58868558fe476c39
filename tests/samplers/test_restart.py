"""Restart against the paper's algorithm and the choice of levels of AUTOMATIC1111's web interface, in loops here."""

import math
from itertools import pairwise

import numpy as np
import pytest
from interpret import trajectory
from mixture import Mixture
from stochastic import assert_distribution, assert_power

from fastdiff import samplers, schedules
from fastdiff.errors import InputError

VP, VE, MIXTURE = schedules.linear(1000), schedules.ve(1000, sigma_min=0.03, sigma_max=15.0), Mixture()


def karras(points, low, high):
    ramp = np.arange(points) / (points - 1)
    return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def heun_walk(pairs, y, draw, s_noise):
    """Heun over (from, to) pairs of levels; where the next pair starts higher, noise is added first."""
    states, last = [], pairs[0][0]

    def slope(y, r):
        states.append(y)
        return (y - MIXTURE.denoise(y, 1.0, r)) / r

    for r, r1 in pairs:
        if r > last:
            y = y + s_noise * math.sqrt(r**2 - last**2) * next(draw)
        d = slope(y, r)
        y = y + (r1 - r) * (d if r1 == 0.0 else 0.5 * (d + slope(y + (r1 - r) * d, r1)))
        last = r1
    return [*states[1:], y]


def pairs_of(levels, intervals):
    """The paper's order of steps; an interval's count is of its points."""
    stops = {}
    for low, high, passes, count in intervals:
        stops[int(np.argmin(np.abs(levels[:-1] - low)))] = (count, passes, high)
    pairs = []
    for i in range(len(levels) - 1):
        pairs.append((levels[i], levels[i + 1]))
        if i + 1 in stops:
            count, passes, high = stops[i + 1]
            again = karras(count, levels[i + 1], high)
            again[-1] = levels[i + 1]
            pairs += list(pairwise(again)) * passes
    return pairs


CASES = {
    "cifar10": ((0.06, 0.30, 2, 2),),
    "default": ((0.1, 2.0, 1, 9),),
    "many": ((1.09, 1.92, 1, 3), (0.59, 1.09, 2, 3), (0.06, 0.30, 3, 5)),
    "one_step": ((0.3, 0.9, 2, 1),),
}


@pytest.mark.parametrize("schedule", [VP, VE], ids=["vp", "ve"])
@pytest.mark.parametrize("case", CASES)
def test_the_papers_loop(case, schedule):
    intervals, generator = CASES[case], np.random.default_rng(0)
    options = {"schedule": schedule, "steps": 18, "prediction": "epsilon", "s_noise": 1.003}
    table = samplers.build("restart", intervals=intervals, **options)
    y = table.init_level[1] * generator.standard_normal(30)
    z = generator.standard_normal((20, 30))
    counted = [(low, high, passes, steps + 1) for low, high, passes, steps in intervals]
    expected = heun_walk(pairs_of(table.grid.noise_ratios, counted), y, iter(z), 1.003)
    remaining = iter(z)
    found = trajectory(MIXTURE.denoiser(schedule, "epsilon"), table, y, lambda _: next(remaining))
    for ours, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-9, atol=1e-9)
    assert len(table) == 35 + sum(2 * passes * steps for _, _, passes, steps in intervals)


@pytest.mark.parametrize(("total", "passes", "each"), [(20, 1, 9), (35, 1, 9), (36, 2, 9), (50, 2, 12)])
def test_automatic1111_levels(total, passes, each):
    """Its main steps are what remains of the number asked for, and its t_max is the nearest of its levels to 2."""
    main = karras(total - each * passes, 0.03, 15.0)
    top = main[np.argmin(np.abs(main - 2.0))]
    bottom = main[np.argmin(np.abs(main - 0.1))]
    again = karras(each + 1, bottom, top)
    intervals = [(0.1, float(top), passes, each)]
    table = samplers.build("restart", schedule=VE, steps=len(main), prediction="sample", intervals=intervals)
    stop = int(np.argmin(np.abs(main - 0.1)))
    levels = [*main[: stop + 1], *(list(again) * passes), *main[stop + 1 :]]
    firsts = [r for r, r1 in zip(levels, [*levels[1:], 0.0], strict=True) if r1 < r]
    # Both rows of a step but the last say where they are; the first of each is the step's start.
    found = table.timesteps[::2]
    assert len(found) == total
    np.testing.assert_allclose(found, firsts, rtol=1e-9)


def test_without_intervals_it_is_heun():
    options = {"schedule": VP, "steps": 7, "prediction": "v"}
    heun, restart = samplers.build("heun", **options), samplers.build("restart", intervals=(), **options)
    assert np.array_equal(heun.rows, restart.rows)


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_an_interval_without_room_is_left_out(steps):
    """A grid whose steps all end above t_max, but for the one to the data."""
    table = samplers.build(
        "restart", schedule=VE, steps=steps, prediction="sample", intervals=[(0.01, 0.02, 3, 3)], sigma_min=0.5
    )
    assert len(table) == 2 * steps - 1


def test_distribution():
    assert_distribution("restart", intervals=((0.1, 2.0, 3, 60), (2.0, 20.0, 1, 60)), sigma_max=50.0)


def test_a_wrong_noise_coefficient_is_seen():
    assert_power("restart", intervals=((0.1, 2.0, 6, 40),), sigma_max=50.0)


@pytest.mark.parametrize(
    "intervals",
    [
        5,
        "0.1",
        [0.1, 2.0, 1, 9],
        [(0.1, 2.0, 1)],
        [(2.0, 0.1, 1, 9)],
        [(0.1, 2.0, 0, 9)],
        [(0.1, 2.0, 1, 2.5)],
        [(0.0, 2.0, 1, 9)],
    ],
)
def test_bad_intervals_are_refused(intervals):
    with pytest.raises(InputError, match="restart: intervals: expected"):
        samplers.build("restart", schedule=VP, steps=9, prediction="v", intervals=intervals)


def test_the_noise_to_start_with():
    """As for `euler`: r itself, or sqrt(1 + r^2)."""
    for initial, power in (("sigma", 0.0), ("marginal", 1.0)):
        table = samplers.build("restart", schedule=schedules.linear(1000), steps=4, initial=initial)
        ratio = float(table.grid.noise_ratios[0])
        assert abs(table.init_scale - (power + ratio**2) ** 0.5) < 1e-9 * ratio
