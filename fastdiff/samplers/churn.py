"""Stochastic churn: a step starts from a noise level that fresh noise has raised.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 2.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import Coefficients, fraction

CHURN_OPTIONS: Mapping[str, float | None] = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": None, "s_noise": 1.0}
"""The options of every method with churn; s_tmax = None is no bound."""


@dataclass(frozen=True, eq=False)
class ChurnedStep:
    """A step from `start`, whose level is raised already, to the grid's next point `end`.

    Its last row takes the state on to `to`, the raised level from which the next step starts, with `raised`.
    s_noise scales the fresh noise.
    """

    start: Point
    end: Point
    to: Point
    s_noise: float

    def raised(self, new_x: Coefficients) -> dict[str, float]:
        """The coefficients of the state at `to` from those of the state at `end`."""
        signal = self.to.level[0]
        keep, noise = signal / self.end.level[0], signal * self.s_noise * added_noise(self.end, self.to)
        return {**{name: keep * value for name, value in new_x.items()}, "noise": noise}


@dataclass(frozen=True)
class Churn:
    """R = (1 + gamma) r and Y = y + s_noise sqrt(R^2 - r^2) z before a step from y = x / alpha, r = sigma / alpha.

    gamma = min(s_churn / steps, sqrt(2) - 1) where s_tmin <= r <= s_tmax, else 0. s_churn = 0 is no churn. The steps
    are those of the whole grid, before `strength` takes the last of them.
    """

    s_churn: float
    s_tmin: float
    s_tmax: float
    s_noise: float

    def steps(self, problem: Problem, *, scaled: bool = True) -> Iterator[ChurnedStep]:
        """Every step of the grid, in y = x / alpha or, where not `scaled`, in x."""
        points = problem.points(scaled=scaled)
        raised = [*(self.raise_level(problem, point, scaled=scaled) for point in points[:-1]), points[-1]]
        for (start, to), end in zip(pairwise(raised), points[1:], strict=True):
            yield ChurnedStep(start, end, to, self.s_noise)

    def raise_level(self, problem: Problem, point: Point, *, scaled: bool = True) -> Point:
        """The point from which the step that begins at `point` starts; itself where there is no churn."""
        gamma = self.gamma(problem, point.ratio)
        return point if gamma == 0.0 else problem.at_ratio((1.0 + gamma) * point.ratio, scaled=scaled)

    def gamma(self, problem: Problem, ratio: float) -> float:
        """By how much of itself a level is raised."""
        if not self.s_tmin <= ratio <= self.s_tmax or math.isinf(ratio):
            return 0.0
        return min(self.s_churn / (problem.grid.skipped + problem.grid.steps), math.sqrt(2.0) - 1.0)

    def init_scale(self, problem: Problem, base: float, *, scaled: bool = True) -> float:
        """Standard deviation of the noise to start with: `base` at the grid's first point, and the first churn."""
        first = problem.points(scaled=scaled)[0]
        to = self.raise_level(problem, first, scaled=scaled)
        if to is first:
            return base
        signal = to.level[0]
        return math.hypot(signal / first.level[0] * base, signal * self.s_noise * added_noise(first, to))


def added_noise(low: Point, high: Point) -> float:
    """sqrt(high^2 - low^2) of the two ratios: the noise that takes y = x / alpha from the one level to the other."""
    return 0.0 if high is low else math.sqrt(max(high.ratio**2 - low.ratio**2, 0.0))


def churn_from(method: str, s_churn: Any, s_tmin: Any, s_tmax: Any, s_noise: Any) -> Churn:
    """The churn of a method's options; InputError for one that is negative or no number."""
    return Churn(
        fraction(method, "s_churn", s_churn, high=math.inf),
        fraction(method, "s_tmin", s_tmin, high=math.inf),
        math.inf if s_tmax is None else fraction(method, "s_tmax", s_tmax, high=math.inf),
        fraction(method, "s_noise", s_noise, high=10.0),
    )
