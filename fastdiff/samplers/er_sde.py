"""ER-SDE: exponential solvers of an extended family of reverse SDEs.

Cui et al. 2023, "Elucidating the Solution Space of Extended Reverse-Time SDE for Diffusion Models".
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, fraction, make_row, make_table, whole

Scaling = Callable[[float], float]
SCALINGS: dict[str, Scaling] = {
    "er": lambda r: math.exp(min(r**0.3, 700.0)) + 10.0,
    "sde": lambda r: r,
    "ode": lambda r: 1.0,
}
"""phi(r)/r of each noise scale."""
# Of 1/phi, whose logarithm is nearly straight in log r.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def er_sde(
    problem: Problem,
    *,
    max_stage: int = 3,
    scaling: str | Scaling = "er",
    s_noise: float = 1.0,
    points: int | None = None,
) -> StepTable:
    """x' = (alpha'/alpha) c x + alpha' (1 - c) D + alpha' (r' - r + phi' I_0) D^1
         + alpha' ((r' - r)^2/2 + phi' I_1) D^2 + alpha' s_noise sqrt(r'^2 - c^2 r^2) z,

    r = sigma/alpha, phi = phi(r), c = phi'/phi, I_n = int (l - r)^n / phi(l) dl from r' to r. D^1 = (D - D_1)/(r - r_1)
    with the data prediction D_1 at r_1 before, and D^2 = 2 (D^1 - D^1_1)/(r - r_2). A step to sigma' = 0 gives D.

    max_stage   1: D alone, 2: D^1 as well, 3: D^2 as well; the first steps have fewer
    scaling     "er": phi = r (exp(r^0.3) + 10), the paper's choice; "sde": r^2, the reverse SDE of the diffusion;
                "ode": r, the probability-flow ODE; or a function that gives phi(r)/r
    s_noise     the noise is multiplied by it
    points      None: the integrals to rounding; a number: their left Riemann sums with so many points, as the authors'
                code and ComfyUI take them, with 200

    Of order 1 with one stage and of order 2 with two or three: D^1 is a difference to one side.
    Source: Cui et al. 2023, equations 12 to 16.
    """
    whole("er_sde", "max_stage", max_stage, 1, 3)
    s_noise = fraction("er_sde", "s_noise", s_noise, high=100.0)
    if points is not None:
        whole("er_sde", "points", points, 1, 100_000)
    quotient = scaling if callable(scaling) else SCALINGS[choice("er_sde", "scaling", scaling, tuple(SCALINGS))]
    return make_table("er_sde", problem, _rows(problem, max_stage, quotient, s_noise, points))


def _rows(problem: Problem, stages: int, quotient: Scaling, s_noise: float, count: int | None) -> Iterator[Row]:
    points, last = problem.points(), problem.grid.steps - 1
    used = [1 if end.sigma == 0.0 else min(stages, i + 1) for i, end in enumerate(points[1:])]
    for i, (start, end) in enumerate(pairwise(points)):
        kept = any(used[j] > j - i for j in range(i + 1, min(i + 3, last + 1)))
        nodes = [points[i - j].ratio for j in range(used[i])]
        new_x = _step(start, end, nodes, quotient, s_noise, count)
        yield make_row(problem, start, new_x, to=end, history={"D": 1.0} if kept else None)


def _step(
    start: Point, end: Point, nodes: Sequence[float], quotient: Scaling, s_noise: float, count: int | None
) -> dict[str, float]:
    """nodes: sigma/alpha where D, D_1 and D_2 are known."""
    r, r1 = start.ratio, end.ratio
    if r1 == 0.0:
        return {"D": end.alpha}
    q = 0.0 if math.isinf(r) else quotient(r1) / quotient(r)
    if math.isinf(r) and quotient is SCALINGS["ode"]:
        q = 1.0
    weights = [end.alpha * (1.0 - r1 / r * q), 0.0, 0.0]
    if len(nodes) > 1 and r1 < r < math.inf:
        zeroth, first = _integrals(quotient, r1, r, count)
        scale, since = quotient(r1) * r1, r - nodes[1]
        one = end.alpha * (r1 - r + scale * zeroth) / since
        weights[0] += one
        weights[1] -= one
        if len(nodes) > 2:
            two = 2.0 * end.alpha * ((r1 - r) ** 2 / 2.0 + scale * first) / (r - nodes[2])
            weights[0] += two / since
            weights[1] -= two / since + two / (nodes[1] - nodes[2])
            weights[2] += two / (nodes[1] - nodes[2])
    noise = end.sigma * s_noise * math.sqrt(max(1.0 - q * q, 0.0))
    named = zip(("D", "hist1", "hist2"), weights, strict=True)
    return {"x": end.sigma / start.sigma * q, "noise": noise, **dict(named)}


def _integrals(quotient: Scaling, low: float, high: float, count: int | None) -> tuple[float, float]:
    """I_0 and I_1 from `low` to `high`."""
    if count is None:
        # In log r, where 1/phi dr is r/phi d(log r).
        middle, half = math.log(low * high) / 2.0, math.log(high / low) / 2.0
        r = np.exp(middle + half * _NODES)
        density = half * _WEIGHTS / np.array([quotient(value) for value in r.tolist()])
    else:
        step = (high - low) / count
        r = low + step * np.arange(count)
        density = step / (r * np.array([quotient(value) for value in r.tolist()]))
    return float(density.sum()), float(((r - high) * density).sum())


OPTIONS: dict[str, Any] = {"max_stage": 3, "scaling": "er", "s_noise": 1.0, "points": None}

INFO = MethodInfo(
    name="er_sde",
    paper="Cui et al. 2023, Elucidating the Solution Space of Extended Reverse-Time SDE for Diffusion Models",
    order=2,
    stochastic=True,
    evaluations_per_step=1,
    history=2,
    options=OPTIONS,
    rows=er_sde,
)
