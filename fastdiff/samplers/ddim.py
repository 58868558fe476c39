"""DDIM. Song et al. 2021, "Denoising Diffusion Implicit Models", equations 12 and 16."""

import math
from collections.abc import Iterator
from itertools import pairwise

from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, fraction, make_row, make_table

PREVIOUS = ("grid", "stride")


def ddim(
    problem: Problem, *, eta: float = 0.0, clipped_epsilon: bool = True, previous_timestep: str = "grid"
) -> StepTable:
    """x' = alpha' D + sqrt(sigma'^2 - s^2) epsilon + s z, s^2 = eta^2 (sigma'^2/sigma^2) (sigma^2 - a^2 sigma'^2).

    a = alpha/alpha'; eta = 0 is deterministic, eta = 1 is DDPM.
    clipped_epsilon     where D is clipped, whether epsilon is the one that leads from x to the clipped D (guided
                        diffusion) or the network's own (diffusers).
    previous_timestep   "grid": a step ends where the next begins. "stride": it ends at t - T // steps, as in
                        diffusers, which misses the next point with any spacing but "leading".
    """
    eta = fraction("ddim", "eta", eta)
    choice("ddim", "previous_timestep", previous_timestep, PREVIOUS)
    return make_table("ddim", problem, _rows(problem, eta, clipped_epsilon, previous_timestep == "stride"))


def _rows(problem: Problem, eta: float, clipped_epsilon: bool, stride: bool) -> Iterator[Row]:
    points = problem.points()
    for start, following in pairwise(points):
        end = _stride_end(problem, start, points[-1]) if stride else following
        alpha, sigma = start.alpha, start.sigma
        forward = max(sigma**2 - (alpha / end.alpha * end.sigma) ** 2, 0.0)
        std = eta * end.sigma / sigma * math.sqrt(forward)
        direction = math.sqrt(max(end.sigma**2 - std**2, 0.0))
        if problem.bounded and clipped_epsilon:
            new_x = {"x": direction / sigma, "D": end.alpha - direction * alpha / sigma}
        else:
            new_x = {"x": direction * start.noise.x, "m": direction * start.noise.m, "D": end.alpha}
        yield make_row(problem, start, {**new_x, "noise": std}, to=end)


def _stride_end(problem: Problem, start: Point, last: Point) -> Point:
    t = start.timestep - problem.schedule.steps // (problem.grid.skipped + problem.grid.steps)
    return last if t < 0 else problem.at_timestep(t)


INFO = MethodInfo(
    name="ddim",
    paper="Song et al. 2021, Denoising Diffusion Implicit Models",
    order=1,
    stochastic=False,
    evaluations_per_step=1,
    history=0,
    options={"eta": 0.0, "clipped_epsilon": True, "previous_timestep": "grid"},
    diffusers={"spacing": "leading", "clip": 1.0, "clipped_epsilon": False, "previous_timestep": "stride"},
    rows=ddim,
)
