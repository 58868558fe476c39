"""Plans of ancestral samplers on a flow, x = (1 - sigma) x_0 + sigma epsilon: Euler, DPM-Solver-2 and DPM-Solver++ 2S.

A step goes down to d = s' (1 + eta (s'/s - 1)) along the straight line from x to D, is scaled by k = (1 - s')/(1 - d)
to the signal of s', and noise n = sqrt(s'^2 - (k d)^2) makes up for the rest. Source: ComfyUI's samplers of flows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from fastdiff.integrations.k_diffusion.comfyui.plans import Levels, cached, plan_of, problem_of
from fastdiff.integrations.k_diffusion.loop import Plan
from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import Row, make_row, make_table

# The inner level of a step from pure noise, from where half of the way in lambda is no point.
INNER_FROM_NOISE = 0.9999


@dataclass(frozen=True)
class Descent:
    """d, k and n of a step, and s."""

    start: float
    down: float
    scale: float
    noise: float

    @classmethod
    def between(cls, start: float, end: float, eta: float) -> Descent:
        down = end * (1.0 + (end / start - 1.0) * eta)
        scale = (1.0 - end) / (1.0 - down)
        return cls(start, down, scale, math.sqrt(max(end**2 - (down * scale) ** 2, 0.0)))

    def towards(self, level: float) -> float:
        """What is kept of x on the way to a level: x' = q x + (1 - q) D."""
        return level / self.start


def inner_level(start: float, down: float) -> float:
    """Half of the way in lambda = log((1 - s)/s)."""
    if start >= 1.0:
        return INNER_FROM_NOISE
    ratio = math.sqrt(start / (1.0 - start) * down / (1.0 - down))
    return ratio / (1.0 + ratio)


def at_level(problem: Problem, level: float) -> Point:
    """The point of a flow at that level."""
    return problem.at_ratio(level / (1.0 - level))


@cached
def euler(levels: Levels, eta: float, s_noise: float) -> Plan:
    def rows(problem: Problem) -> Iterator[Row]:
        for start, end in pairwise(problem.points()):
            step = Descent.between(start.sigma, end.sigma, eta)
            q = step.towards(step.down)
            new_x = {"x": step.scale * q, "D": step.scale * (1.0 - q), "noise": s_noise * step.noise}
            yield make_row(problem, start, new_x, to=end)

    problem = problem_of(levels, flow=True)
    return plan_of(make_table("euler_ancestral", problem, rows(problem)), levels)


@cached
def dpm_2(levels: Levels, eta: float, s_noise: float) -> Plan:
    """The inner level is sqrt(s d)."""

    def rows(problem: Problem) -> Iterator[Row]:
        for start, end in pairwise(problem.points()):
            step = Descent.between(start.sigma, end.sigma, eta)
            if step.down == 0.0:
                yield make_row(problem, start, {"D": end.alpha}, to=end)
                continue
            middle = at_level(problem, math.sqrt(step.start * step.down))
            q, slope = step.towards(middle.sigma), step.scale * (step.down - step.start) / middle.sigma
            yield make_row(problem, start, {"x": q, "D": 1.0 - q}, to=middle, anchor={"x": 1.0})
            last = {"anchor": step.scale, "x": slope, "D": -slope, "noise": s_noise * step.noise}
            yield make_row(problem, middle, last, to=end)

    problem = problem_of(levels, flow=True)
    return plan_of(make_table("dpm_2_ancestral", problem, rows(problem)), levels, 2, promotes=True, data=False)


@cached
def dpmpp_2s(levels: Levels, eta: float, s_noise: float) -> Plan:
    def rows(problem: Problem) -> Iterator[Row]:
        for start, end in pairwise(problem.points()):
            if end.sigma == 0.0:
                yield make_row(problem, start, {"D": 1.0}, to=end)
                continue
            step = Descent.between(start.sigma, end.sigma, eta)
            middle = at_level(problem, inner_level(step.start, step.down))
            inner, q = step.towards(middle.sigma), step.towards(step.down)
            yield make_row(problem, start, {"x": inner, "D": 1.0 - inner}, to=middle, anchor={"x": step.scale * q})
            last = {"anchor": 1.0, "D": step.scale * (1.0 - q), "noise": s_noise * step.noise}
            yield make_row(problem, middle, last, to=end)

    problem = problem_of(levels, flow=True)
    return plan_of(make_table("dpmpp_2s_ancestral", problem, rows(problem)), levels, 2, data=False)
