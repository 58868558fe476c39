"""Improved PNDM: Adams-Bashforth weights on the noise prediction, from the first step on.

Zhang and Chen 2023, "Fast Sampling of Diffusion Models with Exponential Integrator", section 3.3 and appendix B.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, flag, make_row, make_table, whole
from fastdiff.samplers.terms import ADAMS_BASHFORTH, epsilon, lagrange_weights, multistep

WEIGHTS = ("exact", "published")
Weights = Callable[[Sequence[Point], Point], tuple[float, ...]]


def ipndm(problem: Problem, *, order: int = 4, lower_order_final: bool = True, first_data: bool = True) -> StepTable:
    """x' = (alpha'/alpha) x + (sigma' - alpha' sigma/alpha) e, e = sum_j b_j epsilon_j with Adams-Bashforth's b_j.

    epsilon_0 is the newest noise prediction; the first steps have fewer of them. The weights are those of equal steps
    and the coefficient before e is exact for a constant e only: the order of convergence is 2, whatever `order` is.
    order       1 to 4
    lower_order_final   whether a step to sigma' = 0 takes the newest prediction alone
    first_data  whether a first step from alpha = 0 has its data prediction; diffusers loses it there
    """

    def weights(points: Sequence[Point], end: Point) -> tuple[float, ...]:
        return ADAMS_BASHFORTH[len(points) - 1]

    whole("ipndm", "order", order, 1, 4)
    flag("ipndm", "lower_order_final", lower_order_final)
    flag("ipndm", "first_data", first_data)
    orders = _orders(problem, order, lower_order_final)
    return make_table("ipndm", problem, adams_bashforth_rows(problem, orders, weights, first_data=first_data))


def ipndm_v(problem: Problem, *, order: int = 4, lower_order_final: bool = True, weights: str = "exact") -> StepTable:
    """The step of `ipndm` with weights for steps of any length in r = sigma / alpha.

    weights     "exact": the integrals of the Lagrange polynomials; the same method as `lms`, but that it starts where
                alpha = 0 and by default ends at order 1. "published": those of the released code and of ComfyUI, where
                orders 3 and 4 have a misplaced bracket, and order 4 a wrong sign and, in its oldest weight, a wrong
                quotient of steps: where steps differ these do not add up to 1, and order 4 falls to 2.
    order, lower_order_final   those of `ipndm`; the error of the first step, h^2, remains in the end, as for `lms`
    """
    whole("ipndm_v", "order", order, 1, 4)
    flag("ipndm_v", "lower_order_final", lower_order_final)
    made: Weights = exact_weights if choice("ipndm_v", "weights", weights, WEIGHTS) == "exact" else _published
    return make_table(
        "ipndm_v", problem, adams_bashforth_rows(problem, _orders(problem, order, lower_order_final), made)
    )


def adams_bashforth_rows(
    problem: Problem, orders: Sequence[int], weights: Weights, *, first_data: bool = True
) -> Iterator[Row]:
    """The step of `ipndm`, whose b_j are weights(the points of the epsilon_j, the end of the step); their number is the
    step's order."""
    points = problem.points()
    for i, (start, end) in enumerate(pairwise(points)):
        newest = [points[i - j] for j in range(orders[i])]
        noise = epsilon(problem, start)
        new_x = multistep(start, end, noise, weights(newest, end))
        if start.alpha == 0.0 and not first_data:
            new_x["D"] -= end.alpha
        yield make_row(problem, start, new_x, to=end, history=noise if any(n > 1 for n in orders[i + 1 :]) else None)


def _orders(problem: Problem, order: int, lower_order_final: bool) -> list[int]:
    ends = problem.points()[1:]
    return [1 if lower_order_final and end.sigma == 0.0 else min(order, i + 1) for i, end in enumerate(ends)]


def exact_weights(points: Sequence[Point], end: Point) -> tuple[float, ...]:
    """The integrals of the Lagrange polynomials in r = sigma / alpha, over the length of the step."""
    # A slope at r = inf says nothing about the polynomial in r.
    nodes = [point.ratio for point in points if math.isfinite(point.ratio)]
    return lagrange_weights(nodes, end.ratio) if nodes else (1.0,)


def _published(points: Sequence[Point], end: Point) -> tuple[float, ...]:
    """Newton's form: the backward differences that order n adds to order n - 1, times g_n."""
    r = [end.ratio, *(point.ratio for point in points if math.isfinite(point.ratio))]
    h = [later - earlier for later, earlier in pairwise(r)]
    weights = [1.0]
    if len(h) > 1:
        weights = [1.0 + h[0] / h[1] / 2.0, -h[0] / h[1] / 2.0]
    if len(h) > 2:
        # What the quotient ought to multiply is (1 - h0 / (3 (h0 + h1))) / 2.
        quotient = h[0] * (h[0] + h[1]) / (h[1] * (h[1] + h[2]))
        g = (1.0 - h[0] / (3.0 * (h[0] + h[1])) * quotient) / 2.0
        weights = _add(weights, g, (1.0, -1.0 - h[1] / h[2], h[1] / h[2]))
    if len(h) > 3:
        # The sum in g ought to be a difference, and the last weight -b h2 / h3.
        near, sums = h[0] + h[1], (h[1] + h[2], h[1] + h[2] + h[3])
        g = (1.0 - h[0] / (3.0 * near)) / 2.0 + (1.0 - h[0] / (2.0 * near)) * h[0] / (6.0 * (near + h[2]))
        g *= h[0] * near * (near + h[2]) / (h[1] * sums[0] * sums[1])
        a, b = h[1] / h[2], h[1] * sums[0] / (h[2] * (h[2] + h[3]))
        weights = _add(weights, g, (1.0, -1.0 - a - b, a + b * (1.0 + h[2] / h[3]), -b * h[1] / h[2]))
    return tuple(weights)


def _add(weights: list[float], g: float, differences: Sequence[float]) -> list[float]:
    return [w + g * d for w, d in zip([*weights, 0.0], differences, strict=True)]


PAPER = "Zhang and Chen 2023, Fast Sampling of Diffusion Models with Exponential Integrator"

IPNDM = MethodInfo(
    name="ipndm",
    paper=PAPER,
    order=2,
    stochastic=False,
    evaluations_per_step=1,
    history=3,
    options={"order": 4, "lower_order_final": True, "first_data": True},
    diffusers={"spacing": "trailing", "lower_order_final": False, "first_data": False},
    rows=ipndm,
    grid={"spacing": "karras"},
)
IPNDM_V = MethodInfo(
    name="ipndm_v",
    paper=PAPER,
    order=4,
    stochastic=False,
    evaluations_per_step=1,
    history=3,
    options={"order": 4, "lower_order_final": True, "weights": "exact"},
    rows=ipndm_v,
    grid={"spacing": "karras"},
)
