"""Euler and Euler ancestral in y = x / alpha = x_0 + r epsilon, r = sigma / alpha.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 2 without churn; the
ancestral step is that of k-diffusion (Katherine Crowson).
"""

import math
from collections.abc import Iterable, Iterator
from itertools import pairwise

from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, fraction, make_row, make_table

INITIAL_STATES = ("unit", "sigma")


def euler(problem: Problem, *, initial: str = "unit") -> StepTable:
    """y' = (r'/r) y + (1 - r'/r) D.

    initial     "unit": the network's first input has variance 1, as the schedule's x_T has; "sigma": y starts with
                standard deviation r (diffusers with linspace and trailing spacing).
    """
    return scaled_table("euler", problem, _ancestral_rows(problem, 0.0, 0.0), initial=initial)


def euler_ancestral(problem: Problem, *, eta: float = 1.0, s_noise: float = 1.0, initial: str = "unit") -> StepTable:
    """y' = (d/r) y + (1 - d/r) D + u s_noise z, (d, u) = `ancestral_step`(r, r', eta).

    initial is that of `euler`.
    """
    eta = fraction("euler_ancestral", "eta", eta)
    s_noise = fraction("euler_ancestral", "s_noise", s_noise, high=10.0)
    return scaled_table("euler_ancestral", problem, _ancestral_rows(problem, eta, s_noise), initial=initial)


def _ancestral_rows(problem: Problem, eta: float, s_noise: float) -> Iterator[Row]:
    for start, end in pairwise(problem.points(scaled=True)):
        down, up = ancestral_step(start.ratio, end.ratio, eta)
        shrink = down / start.ratio
        yield make_row(problem, start, {"x": shrink, "D": 1.0 - shrink, "noise": up * s_noise}, to=end)


def ancestral_step(r: float, r1: float, eta: float) -> tuple[float, float]:
    """(d, u): r'^2 = d^2 + u^2, u = min(r', eta r' sqrt(1 - r'^2/r^2)): go down to d without noise, then add u z."""
    up = min(r1, eta * r1 * math.sqrt(max(1.0 - (r1 / r) ** 2, 0.0)))
    return math.sqrt(max(r1**2 - up**2, 0.0)), up


def scaled_table(method: str, problem: Problem, rows: Iterable[Row], *, initial: str = "unit") -> StepTable:
    """The table of a method whose state is y = x / alpha."""
    choice(method, "initial", initial, INITIAL_STATES)
    scale = problem.points(scaled=True)[0].ratio if initial == "sigma" else None
    return make_table(method, problem, rows, init_scale=scale)


DIFFUSERS = {"spacing": "linspace", "integer": False, "interpolation": "linear", "initial": "sigma"}

EULER = MethodInfo(
    name="euler",
    paper="Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models",
    order=1,
    stochastic=False,
    evaluations_per_step=1,
    history=0,
    options={"initial": "unit"},
    diffusers=DIFFUSERS,
    rows=euler,
)
EULER_ANCESTRAL = MethodInfo(
    name="euler_ancestral",
    paper="Crowson 2022, k-diffusion; Karras et al. 2022",
    order=1,
    stochastic=True,
    evaluations_per_step=1,
    history=0,
    options={"eta": 1.0, "s_noise": 1.0, "initial": "unit"},
    diffusers=DIFFUSERS,
    rows=euler_ancestral,
)
