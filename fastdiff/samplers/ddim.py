"""DDIM and its inverse. Song et al. 2021, "Denoising Diffusion Implicit Models", equations 12, 14 and 16."""

import math
from collections.abc import Iterator
from dataclasses import replace

from fastdiff.samplers.problem import Interval, Point, Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, flag, fraction, make_row, make_table
from fastdiff.samplers.terms import ddim_step, epsilon, total

PREVIOUS = ("grid", "stride")
TOLD = ("start", "end")


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
    flag("ddim", "clipped_epsilon", clipped_epsilon)
    choice("ddim", "previous_timestep", previous_timestep, PREVIOUS)
    return make_table("ddim", problem, _rows(problem, eta, clipped_epsilon, previous_timestep == "stride"))


def _rows(problem: Problem, eta: float, clipped_epsilon: bool, stride: bool) -> Iterator[Row]:
    last = problem.points()[-1]
    for interval in problem.intervals():
        if stride:
            interval = Interval(interval.start, stride_end(problem, interval.start, last))
        start, end = interval.start, interval.end
        std = eta * end.sigma / start.sigma * math.sqrt(interval.added) if eta else 0.0
        direction = math.sqrt(max(end.sigma**2 - std**2, 0.0))
        noise = epsilon(problem, start, clipped=clipped_epsilon)
        new_x = total((end.alpha, {"D": 1.0}), (direction, noise), (std, {"noise": 1.0}))
        yield make_row(problem, start, new_x, to=end)


def stride_length(problem: Problem) -> int:
    """diffusers' length of a step, T // steps, of the whole grid."""
    return problem.schedule.steps // (problem.grid.skipped + problem.grid.steps)


def stride_end(problem: Problem, start: Point, last: Point) -> Point:
    """Where a step of that length ends: `last` where that is before the first timestep."""
    t = start.timestep - stride_length(problem)
    return last if t < 0 else problem.at_timestep(t)


def ddim_inverse(
    problem: Problem, *, told: str = "start", clipped_epsilon: bool = True, previous_timestep: str = "grid"
) -> StepTable:
    """x' = alpha' D + sigma' epsilon up a rising grid, from an image to its noise: `ddim` with eta = 0 backwards.

    told                what the network is told at (x, t) in a step to t': "start": t. "end": t', as diffusers does,
                        which is where `ddim` calls it on the way back.
    clipped_epsilon     that of `ddim`
    previous_timestep   "stride": a step to t' starts from the level of t' - T // steps, as in diffusers
    """
    choice("ddim_inverse", "told", told, TOLD)
    flag("ddim_inverse", "clipped_epsilon", clipped_epsilon)
    choice("ddim_inverse", "previous_timestep", previous_timestep, PREVIOUS)
    rows = _inverse_rows(problem, told == "end", clipped_epsilon, previous_timestep == "stride")
    return make_table("ddim_inverse", problem, rows)


def _inverse_rows(problem: Problem, at_end: bool, clipped_epsilon: bool, stride: bool) -> Iterator[Row]:
    first = problem.points()[0]
    for interval in problem.intervals():
        end = interval.end
        start = stride_end(problem, end, first) if stride else interval.start
        if at_end:
            start = replace(start, timestep=end.timestep)
        yield make_row(problem, start, ddim_step(end, epsilon(problem, start, clipped=clipped_epsilon)), to=end)


DDIM = MethodInfo(
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
DDIM_INVERSE = MethodInfo(
    name="ddim_inverse",
    paper="Song et al. 2021, Denoising Diffusion Implicit Models",
    order=1,
    stochastic=False,
    evaluations_per_step=1,
    history=0,
    options={"told": "start", "clipped_epsilon": True, "previous_timestep": "grid"},
    diffusers={
        "spacing": "leading",
        "clip": 1.0,
        "told": "end",
        "clipped_epsilon": False,
        "previous_timestep": "stride",
    },
    rows=ddim_inverse,
    inverse=True,
)
