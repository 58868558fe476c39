"""DEIS. Zhang and Chen 2023, "Fast Sampling of Diffusion Models with Exponential Integrator"."""

import math
from collections.abc import Sequence

import numpy as np

from fastdiff.samplers.adams import Orders, adams_rows
from fastdiff.samplers.ipndm import Weights, adams_bashforth_rows, exact_weights
from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import MethodInfo, StepTable, automatic_flag, choice, make_table, whole
from fastdiff.schedules import Array

POLYNOMIALS = ("log", "rho", "time")
# The VP SDE of Song et al. 2021 as Karras et al. 2022, table 1, fit it to r from 0.002 at t = 0.001 to 80 at t = 1.
_LOW, _HIGH, _FIRST = 0.002, 80.0, 1e-3
_RISE = 2.0 * (math.log1p(_LOW**2) / _FIRST - math.log1p(_HIGH**2)) / (_FIRST - 1.0)
_LEAST = math.log1p(_HIGH**2) - _RISE / 2.0
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


def deis(
    problem: Problem,
    *,
    order: int = 2,
    lower_order_final: bool | None = None,
    polynomial: str = "log",
    points: int | None = None,
) -> StepTable:
    """x'/alpha' = x/alpha + int P dr from r to r', r = sigma/alpha.

    P is a polynomial through the last `order` values of epsilon: the paper's AB-DEIS.

    order               1 to 4; the first steps have lower ones
    lower_order_final   whether the order is at most the number of steps left; None: where there are fewer than 15, with
                        those that `strength` leaves out
    polynomial          the variable of P. "log": log r, that of diffusers ("logrho"); "rho": r (rhoAB), which is
                        `ipndm_v`; "time": t of the VP SDE whose r is 0.002 at t = 0.001 and 80 at t = 1 (tAB),
                        whatever the schedule
    points              of "time": None is the integral to rounding; a number its mean over so many even points, both
                        ends included, as the released code of tAB takes it, with 10000

    A step to sigma' = 0 is of order 1. diffusers: orders 1 to 3, and the last step ends at the schedule's own end.
    """
    whole("deis", "order", order, 1, 4)
    automatic_flag("deis", "lower_order_final", lower_order_final)
    choice("deis", "polynomial", polynomial, POLYNOMIALS)
    if points is not None:
        whole("deis", "points", points, 2, 1_000_000)
    steps = problem.grid.steps
    lower = steps + problem.grid.skipped < 15 if lower_order_final is None else lower_order_final
    orders = [min(order, i + 1, steps - i if lower else order) for i in range(steps)]
    if polynomial == "log":
        return make_table("deis", problem, adams_rows(problem, "noise", [Orders(p) for p in orders]))
    orders = [1 if end.sigma == 0.0 else p for p, end in zip(orders, problem.points()[1:], strict=True)]
    weights = exact_weights if polynomial == "rho" else _time_weights(points)
    return make_table("deis", problem, adams_bashforth_rows(problem, orders, weights))


def _time_weights(count: int | None) -> Weights:
    def weights(points: Sequence[Point], end: Point) -> tuple[float, ...]:
        nodes = [_time(point.ratio) for point in points if math.isfinite(point.ratio)]
        if len(nodes) < 2 or points[0].ratio == end.ratio:
            return (1.0,)
        start, stop = nodes[0], _time(end.ratio)
        if count is None:
            t, share = (start + stop) / 2.0 + (stop - start) / 2.0 * _NODES, _WEIGHTS / 2.0
        else:
            t, share = np.linspace(start, stop, count), np.full(count, 1.0 / count)
        density = share * _slope(t) * (stop - start) / (end.ratio - points[0].ratio)
        lagrange = [math.prod((t - other) / (own - other) for other in nodes if other != own) for own in nodes]
        return tuple(float(density @ values) for values in lagrange)

    return weights


def _time(r: float) -> float:
    """t where the integral of beta, log(1 + r^2), is _RISE t^2/2 + _LEAST t."""
    return (math.sqrt(_LEAST**2 + 2.0 * _RISE * math.log1p(r**2)) - _LEAST) / _RISE


def _slope(t: Array) -> Array:
    """dr/dt."""
    integral = t * (_LEAST + _RISE * t / 2.0)
    return (_LEAST + _RISE * t) * np.exp(integral) / (2.0 * np.sqrt(np.expm1(integral)))


INFO = MethodInfo(
    name="deis",
    paper="Zhang and Chen 2023, Fast Sampling of Diffusion Models with Exponential Integrator",
    order=2,
    stochastic=False,
    evaluations_per_step=1,
    history=1,
    options={"order": 2, "lower_order_final": None, "polynomial": "log", "points": None},
    diffusers={"spacing": "linspace", "endpoint": False, "final_sigma": "schedule"},
    rows=deis,
)
