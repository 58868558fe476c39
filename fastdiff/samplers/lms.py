"""The linear multistep method of k-diffusion (Katherine Crowson): Adams-Bashforth of steps of any length, in r."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np

from fastdiff.samplers.euler import DIFFUSERS, scaled_table
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, make_row, whole
from fastdiff.samplers.terms import SLOPES, epsilon, lagrange_weights, multistep

Weights = Callable[[Sequence[float], float], Sequence[float]]
INTEGRALS = ("exact", "float16", "float32", "float64")


def lms(
    problem: Problem, *, order: int = 4, initial: str = "unit", slopes: str = "needed", integrals: str = "exact"
) -> StepTable:
    """y' = y + sum_j c_j d_j, c_j the integral from r to r' of the Lagrange polynomial of (r_0, r_-1, ...) to j.

    y = x / alpha, r = sigma / alpha; d_j = (y - D)/r at the newest and the earlier points.
    order       1 to 4: of how many slopes; the first steps have fewer, so that over steps of one length the error of
                the first one, h^2, remains in the end. Order 4 shows where the first steps are short.
    initial     that of `euler`
    slopes      which rows keep their slope: those of which a later one reads it, or all, for a caller who may ask for
                another order at a later step, as diffusers' can
    integrals   "exact", or the precision in which the polynomials are evaluated for `quadrature`, as k-diffusion and
                diffusers do it
    """
    whole("lms", "order", order, 1, 4)
    every = choice("lms", "slopes", slopes, SLOPES) == "all"
    weights: Weights = lagrange_weights
    if choice("lms", "integrals", integrals, INTEGRALS) != "exact":
        weights = partial(_quadrature_weights, precision=integrals)
    return scaled_table("lms", problem, _rows(problem, order, every, weights), initial=initial)


def _rows(problem: Problem, order: int, every: bool, weights: Weights) -> Iterator[Row]:
    points, steps = problem.points(scaled=True), problem.grid.steps
    for i, (start, end) in enumerate(pairwise(points)):
        nodes = _different([point.ratio for point in points[max(i - order + 1, 0) : i + 1][::-1]])
        slope = epsilon(problem, start)
        new_x = multistep(start, end, slope, weights(nodes, end.ratio))
        keep = slope if every or (order > 1 and i + 1 < steps) else None
        yield make_row(problem, start, new_x, to=end, history=keep)


def _different(nodes: list[float]) -> list[float]:
    """Those up to the first that is the same as the one before: no polynomial goes through two at one point."""
    for j, (newer, older) in enumerate(pairwise(nodes), start=1):
        if newer == older:
            return nodes[:j]
    return nodes


def _quadrature_weights(nodes: Sequence[float], end: float, *, precision: str) -> Sequence[float]:
    """`lagrange_weights` by `quadrature`."""
    length = end - nodes[0]
    if length == 0.0:
        return (1.0,)
    return [quadrature(tuple(nodes), end, j, precision) / length for j in range(len(nodes))]


@lru_cache(maxsize=4096)
def quadrature(nodes: tuple[float, ...], end: float, j: int, precision: str) -> float:
    """c_j by QUADPACK to a relative error of 1e-4, of the Lagrange polynomial evaluated in `precision`.

    The points lie near the nodes, and where steps are short their differences have few digits left: in float32 the
    weights of 1000 steps are 1e-2 off. Without SciPy it is the exact integral.

    nodes       r_0, r_-1, ...: different numbers of that precision; else it is no number
    precision   a floating dtype's name
    """
    try:
        from scipy import integrate
    except ImportError:
        return lagrange_weights(nodes, end)[j] * (end - nodes[0])
    number = np.dtype(precision).type
    own = number(nodes[j])
    others = [(number(node), own - number(node)) for k, node in enumerate(nodes) if k != j]

    def polynomial(tau: float) -> float:
        product, place = number(1.0), number(tau)
        for node, distance in others:
            product *= (place - node) / distance
        return product

    with np.errstate(all="ignore"):
        # In full, so that what does not converge is no warning.
        return float(integrate.quad(polynomial, nodes[0], end, epsrel=1e-4, full_output=True)[0])


MOST_SLOPE_ROUNDING = 24.0
"""Where `slope_rounding` is twice as much, float32 states of other arithmetic differ by 1e-5; in 10 to 100 steps of the
usual spacings it is half of this or less, but for the last step of 50 or more that lie close there."""


def slope_rounding(levels: Sequence[float], row: int, order: int, precision: str) -> float:
    """sum_j |c_j| sqrt(1 + r_j^2) / r_j / sqrt(1 + r'^2): by how much a step multiplies what a slope (y - D)/r is
    rounded by, for y of size sqrt(1 + r^2). levels: r of the points, positive but for the last, each another one."""
    nodes, end = tuple(levels[max(row - order + 1, 0) : row + 1][::-1]), levels[row + 1]
    weights = (abs(quadrature(nodes, end, j, precision)) for j in range(len(nodes)))
    total = sum(weight * math.hypot(1.0, 1.0 / node) for weight, node in zip(weights, nodes, strict=True))
    return total / math.hypot(1.0, end)


INFO = MethodInfo(
    name="lms",
    paper="Crowson 2022, k-diffusion; Adams and Bashforth 1883",
    order=4,
    stochastic=False,
    evaluations_per_step=1,
    history=3,
    options={"order": 4, "initial": "unit"},
    diffusers=DIFFUSERS,
    rows=lms,
    grid={"spacing": "karras"},
)
