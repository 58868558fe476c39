"""Euler and Heun on the straight path x = (1 - t) x_0 + t epsilon.

Lipman et al. 2023, "Flow Matching for Generative Modeling"; Liu et al. 2023, "Flow Straight and Fast".
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from fastdiff.errors import InputError
from fastdiff.parameterization import Linear
from fastdiff.samplers.churn import CHURN_OPTIONS, Churn, churn_from
from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import Coefficients, MethodInfo, Row, StepTable, flag, make_row, make_table


def flow_euler(problem: Problem, *, stochastic: bool = False, inverted: bool = False) -> StepTable:
    """x' = x + (t' - t) u; with u = (x - D)/t where D is predicted or clipped: x' = (t'/t) x + (1 - t'/t) D.

    stochastic  x' = (1 - t') D + t' z: for networks that were distilled to give the data at once, as `lcm`; an ordinary
                one loses variance.
    inverted    for networks that were trained with time running from 0 at the noise to 1 at the data (Mochi): they are
                called with steps * (1 - t) and give -u.
    """
    flag("flow_euler", "stochastic", stochastic)
    flag("flow_euler", "inverted", inverted)
    if inverted and problem.prediction != "flow":
        raise InputError(f"flow_euler: inverted: needs the prediction 'flow', got {problem.prediction!r}; leave it out")
    return make_table("flow_euler", problem, _euler_rows(problem, stochastic, inverted))


def _euler_rows(problem: Problem, stochastic: bool, inverted: bool) -> Iterator[Row]:
    sign = -1.0 if inverted else 1.0
    for start, end in pairwise(problem.points()):
        t, t1 = start.sigma, end.sigma
        if stochastic:
            new_x = {"D": 1.0 - t1, "noise": t1}
        elif _direct(problem):
            new_x = {"x": 1.0, "m": sign * (t1 - t)}
        else:
            new_x = {"x": t1 / t, "D": 1.0 - t1 / t}
        point, data = _inverted(start) if inverted else (start, None)
        yield make_row(problem, point, new_x, to=end, data=data)


def flow_heun(
    problem: Problem,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float | None = None,
    s_noise: float = 1.0,
) -> StepTable:
    """x~ = x + h u, x' = x + h/2 (u + u~), with h = t' - t, u = (x - D)/t at (x, t) and u~ at (x~, t').

    Two rows a step: the first gives x~ and keeps the anchor x + h/2 u, the second adds h/2 u~ to it. A step to t' = 0
    is Euler's, one row.

    s_churn, s_tmin, s_tmax, s_noise    noise as diffusers' FlowMatchHeunDiscreteScheduler adds it, which takes nothing
            off the signal and does not call the network again: x + s_noise sqrt(s^2 - t^2) z, (t/s) u and h = t' - s
            in place of x, u and h, with s = (1 + gamma) t; gamma = min(s_churn / evaluations, sqrt(2) - 1) where
            s_tmin <= t <= s_tmax, else 0, of the evaluations of the whole grid.
    """
    churn = churn_from("flow_heun", s_churn, s_tmin, s_tmax, s_noise)
    return make_table("flow_heun", problem, _heun_rows(problem, churn))


def _heun_rows(problem: Problem, churn: Churn) -> Iterator[Row]:
    evaluations = 2 * (problem.grid.skipped + problem.grid.steps) - (problem.grid.sigmas[-1] == 0.0)
    for start, end in pairwise(problem.points()):
        t, u = start.sigma, _velocity(problem, start)
        gamma = min(churn.s_churn / evaluations, math.sqrt(2.0) - 1.0) if churn.s_tmin <= t <= churn.s_tmax else 0.0
        h = end.sigma - (1.0 + gamma) * t
        u = {name: value / (1.0 + gamma) for name, value in u.items()}
        noise = {"noise": churn.s_noise * t * math.sqrt(gamma * (2.0 + gamma))}
        if end.sigma == 0.0:
            yield make_row(problem, start, {**_moved("x", h, u), **noise}, to=end)
            return
        anchor = {**_moved("x", 0.5 * h, u), **noise}
        yield make_row(problem, start, {**_moved("x", h, u), **noise}, to=end, anchor=anchor)
        yield make_row(problem, end, _moved("anchor", 0.5 * h, _velocity(problem, end)), to=end)


def _direct(problem: Problem) -> bool:
    """Whether the network's own output is u."""
    return problem.prediction == "flow" and not problem.bounded


def _velocity(problem: Problem, point: Point) -> Coefficients:
    return {"m": 1.0} if _direct(problem) else {"x": 1.0 / point.sigma, "D": -1.0 / point.sigma}


def _moved(origin: str, h: float, u: Coefficients) -> Coefficients:
    """origin + h u."""
    moved = {name: h * value for name, value in u.items()}
    return {**moved, origin: moved.get(origin, 0.0) + 1.0}


def _inverted(point: Point) -> tuple[Point, Linear]:
    """The point under the name that the network knows it by, and D from -u."""
    return replace(point, timestep=point.schedule.steps - point.timestep), Linear(point.data.x, -point.data.m)


EULER = MethodInfo(
    name="flow_euler",
    paper="Lipman et al. 2023, Flow Matching for Generative Modeling; Esser et al. 2024 (the shift)",
    order=1,
    stochastic=False,
    evaluations_per_step=1,
    history=0,
    options={"stochastic": False, "inverted": False},
    kinds=("flow",),
    diffusers={"spacing": "linspace"},
    rows=flow_euler,
)
HEUN = MethodInfo(
    name="flow_heun",
    paper="Lipman et al. 2023, Flow Matching for Generative Modeling; Karras et al. 2022, algorithm 1",
    order=2,
    stochastic=False,
    evaluations_per_step=2,
    history=0,
    options=CHURN_OPTIONS,
    kinds=("flow",),
    diffusers={"spacing": "linspace"},
    rows=flow_heun,
)
