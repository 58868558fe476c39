"""Restart: an ODE solver whose state is noised again, and solved again, over an interval of noise levels.

Xu et al. 2023, "Restart Sampling for Improving Generative Processes", algorithm 1.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from fastdiff.errors import InputError
from fastdiff.samplers import spacings
from fastdiff.samplers.churn import ChurnedStep
from fastdiff.samplers.euler import scaled_table
from fastdiff.samplers.heun import heun_step
from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, fraction

RHO = 7.0
INTERVALS = ((0.1, 2.0, 1, 9),)


class Interval(NamedTuple):
    """Down to the grid's point nearest to t_min, then `passes` times up to t_max and down again in `steps` steps."""

    t_min: float
    t_max: float
    passes: int
    steps: int


def restart(
    problem: Problem,
    *,
    intervals: Sequence[tuple[float, float, int, int]] = INTERVALS,
    s_noise: float = 1.0,
    initial: str = "unit",
) -> StepTable:
    """`heun`, and where it reaches t_min, K times: y + s_noise sqrt(t_max^2 - t_min^2) z, and Heun down to t_min again.

    Levels are r = sigma / alpha, and the state is y = x / alpha. The way down has `steps` steps, even in r^(1/7) as in
    Karras et al. 2022; `build`'s steps are those of the grid alone. Each pass draws its own z.
    intervals   (t_min, t_max, K, steps) each. t_min becomes the nearest point of the grid at which a step ends, but not
                sigma = 0; an interval is left out where there is none below t_max. The default is that of
                AUTOMATIC1111's web interface from 20 steps on. That interface takes the 9 steps out of the number that
                is asked for, and from 36 on makes two passes, each of a quarter of that number. Its lists and the
                paper's count the points of a pass, one more than its steps.
    s_noise     factor of z; the paper's experiments have 1.003
    initial     that of `euler`
    """
    s_noise = fraction("restart", "s_noise", s_noise, high=10.0)
    return scaled_table("restart", problem, _rows(problem, _checked(intervals), s_noise), initial=initial)


def _rows(problem: Problem, intervals: Sequence[Interval], s_noise: float) -> Iterator[Row]:
    points = problem.points(scaled=True)
    stops = [_stop(points, interval) for interval in intervals]
    for i, (start, end) in enumerate(pairwise(points), start=1):
        levels = [start, end]
        for stop, interval in zip(stops, intervals, strict=True):
            if stop == i:
                levels += _passes(problem, interval, end)
        yield from _walk(problem, levels, s_noise)


def _walk(problem: Problem, levels: Sequence[Point], s_noise: float) -> Iterator[Row]:
    """Heun's steps down the levels; where they rise, the row before ends at the higher one."""
    for k, (start, end) in enumerate(pairwise(levels)):
        if end.ratio < start.ratio:
            rises = k + 2 < len(levels) and levels[k + 2].ratio > end.ratio
            yield from heun_step(problem, ChurnedStep(start, end, levels[k + 2] if rises else end, s_noise))


def _passes(problem: Problem, interval: Interval, low: Point) -> list[Point]:
    ramp = np.linspace(0.0, 1.0, interval.steps + 1)[:-1]
    down = spacings.power(interval.t_max, low.ratio, ramp, RHO).tolist()
    return [*(problem.at_ratio(ratio, scaled=True) for ratio in down), low] * interval.passes


def _stop(points: Sequence[Point], interval: Interval) -> int | None:
    """The index of the point at which the interval begins."""
    inner = range(1, len(points) - (points[-1].ratio == 0.0))
    if not inner:
        return None
    nearest = min(inner, key=lambda index: abs(points[index].ratio - interval.t_min))
    return nearest if points[nearest].ratio < interval.t_max else None


def _checked(intervals: Any) -> list[Interval]:
    given = list(intervals) if isinstance(intervals, Sequence) and not isinstance(intervals, str) else [intervals]
    for one in given:
        if not isinstance(one, Sequence) or len(one) != 4 or not _fits(*one):
            raise InputError(
                "restart: intervals: expected (t_min, t_max, passes, steps) with 0 < t_min < t_max and at least one "
                f"pass and one step, got {one!r}"
            )
    return [Interval(*one) for one in given]


def _fits(t_min: Any, t_max: Any, passes: Any, steps: Any) -> bool:
    levels = all(isinstance(value, int | float) and not isinstance(value, bool) for value in (t_min, t_max))
    counts = all(isinstance(value, int) and not isinstance(value, bool) and value >= 1 for value in (passes, steps))
    return levels and counts and 0.0 < t_min < t_max < math.inf


INFO = MethodInfo(
    name="restart",
    paper="Xu et al. 2023, Restart Sampling for Improving Generative Processes",
    order=2,
    stochastic=True,
    evaluations_per_step=2,
    history=0,
    options={"intervals": INTERVALS, "s_noise": 1.0, "initial": "unit"},
    rows=restart,
    grid={"spacing": "karras"},
)
