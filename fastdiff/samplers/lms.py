"""The linear multistep method of k-diffusion (Katherine Crowson): Adams-Bashforth of steps of any length, in r."""

from collections.abc import Iterator
from itertools import pairwise

from fastdiff.samplers.euler import DIFFUSERS, scaled_table
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, make_row, whole
from fastdiff.samplers.terms import SLOPES, epsilon, lagrange_weights, multistep


def lms(problem: Problem, *, order: int = 4, initial: str = "unit", slopes: str = "needed") -> StepTable:
    """y' = y + sum_j c_j d_j, c_j the integral from r to r' of the Lagrange polynomial of (r_0, r_-1, ...) to j.

    y = x / alpha, r = sigma / alpha; d_j = (y - D)/r at the newest and the earlier points. k-diffusion and diffusers
    integrate the same polynomials numerically.
    order       1 to 4: of how many slopes; the first steps have fewer, so that over steps of one length the error of
                the first one, h^2, remains in the end. Order 4 shows where the first steps are short.
    initial     that of `euler`
    slopes      which rows keep their slope: those of which a later one reads it, or all, for a caller who may ask for
                another order at a later step, as diffusers' can
    """
    whole("lms", "order", order, 1, 4)
    every = choice("lms", "slopes", slopes, SLOPES) == "all"
    return scaled_table("lms", problem, _rows(problem, order, every), initial=initial)


def _rows(problem: Problem, order: int, every: bool) -> Iterator[Row]:
    points, steps = problem.points(scaled=True), problem.grid.steps
    for i, (start, end) in enumerate(pairwise(points)):
        nodes = _different([point.ratio for point in points[max(i - order + 1, 0) : i + 1][::-1]])
        slope = epsilon(problem, start)
        new_x = multistep(start, end, slope, lagrange_weights(nodes, end.ratio))
        keep = slope if every or (order > 1 and i + 1 < steps) else None
        yield make_row(problem, start, new_x, to=end, history=keep)


def _different(nodes: list[float]) -> list[float]:
    """Those up to the first that is the same as the one before: no polynomial goes through two at one point."""
    for j, (newer, older) in enumerate(pairwise(nodes), start=1):
        if newer == older:
            return nodes[:j]
    return nodes


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
