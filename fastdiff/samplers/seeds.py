"""SEEDS: exponential integrators of the reverse SDE that take two or three network calls a step.

Gonzalez et al. 2023, "SEEDS: Exponential SDE Solvers for Fast High-Quality Sampling from Diffusion Models", for the
data prediction. Between lambda_a and lambda_b, l = lambda_b - lambda_a and k = 1 + eta, the SDE's exact solution is

    x_b = (sigma_b/sigma_a) e^(-eta l) x_a + k alpha_b int e^(-k (lambda_b - l)) D dl + sigma_b n z,

n^2 = 1 - e^(-2 eta l), and the noise of a step is that of its parts, one after the other.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fastdiff.errors import InputError
from fastdiff.samplers.exponential import SOLVERS, log_ratio, phi
from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, fraction, make_row, make_table


def seeds_2(
    problem: Problem, *, r: float = 0.5, eta: float = 1.0, s_noise: float = 1.0, solver: str = "midpoint"
) -> StepTable:
    """u = (sigma_s/sigma) e^(-eta r h) x + alpha_s (1 - e^(-k r h)) D + sigma_s s_noise n_1 z_1,
    x' = (sigma'/sigma) e^(-eta h) x + alpha' (b_1 D + b_2 D_u) + sigma' s_noise (e^(-eta (1 - r) h) n_1 z_1 + n_2 z_2).

    h is the step in lambda = log(alpha/sigma), k = 1 + eta, s lies at lambda + r h, D_u is the prediction for u at s;
    n_1^2 = 1 - e^(-2 eta r h), n_2^2 = 1 - e^(-2 eta (1 - r) h); b_1 + b_2 = 1 - e^(-k h). A step to sigma' = 0, or
    from no signal, is of order 1.

    r         where s lies, above 0 and up to 1; default 1/2. 1 is the end of the step: the exponential Heun method
    eta       0: the probability-flow ODE, 1: the reverse SDE of the diffusion, and what lies between; default 1
    s_noise   the noise is multiplied by it
    solver    b_2 = (1 - e^(-k h))/(2 r) for "midpoint", k h phi_2(-k h)/r for "heun"
    """
    stage, noise = _Options("seeds_2", eta, s_noise), choice("seeds_2", "solver", solver, SOLVERS)
    r = fraction("seeds_2", "r", r)
    if r == 0.0:
        raise InputError("seeds_2: r: expected a number above 0 and up to 1, got 0.0")
    rows = (row for step in _steps(problem, stage) for row in _two_calls(problem, step, r, noise))
    return make_table("seeds_2", problem, rows)


def seeds_3(
    problem: Problem, *, r1: float = 1.0 / 3.0, r2: float = 2.0 / 3.0, eta: float = 1.0, s_noise: float = 1.0
) -> StepTable:
    """`seeds_2` with a second inner point at lambda + r2 h, reached from x, D and D_u with the weights of "heun":

    x' = (sigma'/sigma) e^(-eta h) x + alpha' (b_1 D + b_2 D_v) + noise, b_2 = k h phi_2(-k h)/r2, D_v that at the
    second point. Of order 3 without noise, if r2 = 2/3.

    r1, r2          where the inner points lie, 0 < r1 < r2 < 1; default 1/3 and 2/3
    eta, s_noise    those of `seeds_2`
    """
    r1, r2 = fraction("seeds_3", "r1", r1), fraction("seeds_3", "r2", r2)
    if not 0.0 < r1 < r2 < 1.0:
        raise InputError(f"seeds_3: r1, r2: expected 0 < r1 < r2 < 1, got {r1!r} and {r2!r}")
    steps = _steps(problem, _Options("seeds_3", eta, s_noise))
    return make_table("seeds_3", problem, (row for step in steps for row in _three_calls(problem, step, r1, r2)))


class _Options:
    """eta and s_noise, checked."""

    def __init__(self, method: str, eta: Any, s_noise: Any) -> None:
        self.eta = fraction(method, "eta", eta, high=100.0)
        self.s_noise = fraction(method, "s_noise", s_noise, high=100.0)


@dataclass(frozen=True)
class _Step:
    """A step and what its parts of length c h are made of."""

    start: Point
    end: Point
    eta: float
    s_noise: float

    @property
    def inside(self) -> bool:
        """Whether there is a point between its ends."""
        return self.start.ratio < math.inf and self.end.ratio not in (0.0, self.start.ratio)

    def point(self, problem: Problem, r: float) -> Point:
        return self.end if r == 1.0 else problem.at_ratio(self.start.ratio * self.decay(r))

    def decay(self, c: float) -> float:
        """e^(-c h)."""
        return (self.end.ratio / self.start.ratio) ** c

    def carry(self, to: Point, c: float) -> float:
        """What x is multiplied by on the way to `to`, c of the step away."""
        return to.sigma / self.start.sigma * self.decay(c * self.eta)

    def total(self, c: float) -> float:
        """1 - e^(-c k h): what multiplies a constant D."""
        return 1.0 - self.decay(c * (1.0 + self.eta))

    def bend(self, c: float) -> float:
        """z phi_2(-z), z = c k h: what multiplies a D that rises from 0 to 1 along the way."""
        z = c * (1.0 + self.eta) * log_ratio(self.start.ratio, self.end.ratio)
        return z * phi(2, -z)

    def fresh(self, c: float) -> float:
        """The noise of a part, over its last sigma."""
        return self.s_noise * math.sqrt(max(1.0 - self.decay(2.0 * c * self.eta), 0.0))

    def kept(self, c: float) -> float:
        """What is left of a noise, over sigma, after a part."""
        return self.decay(c * self.eta)


def _steps(problem: Problem, options: _Options) -> Iterator[_Step]:
    for start, end in pairwise(problem.points()):
        yield _Step(start, end, options.eta, options.s_noise)


def _one_call(problem: Problem, step: _Step) -> Row:
    end = step.end
    new_x = {"x": step.carry(end, 1.0), "D": end.alpha * step.total(1.0), "noise": end.sigma * step.fresh(1.0)}
    return make_row(problem, step.start, new_x, to=end)


def _two_calls(problem: Problem, step: _Step, r: float, solver: str) -> Iterator[Row]:
    if not step.inside:
        yield _one_call(problem, step)
        return
    end, middle = step.end, step.point(problem, r)
    weight = (step.bend(1.0) if solver == "heun" else step.total(1.0) / 2.0) / r
    weights = (_difference(step.total(1.0), weight), weight)
    drawn = step.fresh(r)
    first = {"x": step.carry(middle, r), "D": middle.alpha * step.total(r), "noise": middle.sigma * drawn}
    known = {"x": step.carry(end, 1.0), "D": end.alpha * weights[0], "noise": end.sigma * drawn * step.kept(1.0 - r)}
    yield make_row(problem, step.start, first, to=middle, anchor=known)
    last = {"anchor": 1.0, "D": end.alpha * weights[1], "noise": end.sigma * step.fresh(1.0 - r)}
    yield make_row(problem, middle, last, to=end)


def _three_calls(problem: Problem, step: _Step, r1: float, r2: float) -> Iterator[Row]:
    if not step.inside:
        yield _one_call(problem, step)
        return
    end, points = step.end, (step.point(problem, r1), step.point(problem, r2))
    inner, weight = step.bend(r2) * r2 / r1, step.bend(1.0) / r2
    drawn = (step.fresh(r1), step.fresh(r2 - r1))

    def known(to: Point, r: float, own: float) -> dict[str, float]:
        noise = to.sigma * drawn[0] * step.kept(r - r1)
        return {"x": step.carry(to, r), "D": to.alpha * _difference(step.total(r), own), "noise": noise}

    first = {"x": step.carry(points[0], r1), "D": points[0].alpha * step.total(r1), "noise": points[0].sigma * drawn[0]}
    second, last = known(points[1], r2, inner), known(end, 1.0, weight)
    yield make_row(problem, step.start, first, to=points[0], anchor=second, history=last)
    second = {"anchor": 1.0, "D": points[1].alpha * inner, "noise": points[1].sigma * drawn[1]}
    last = {"hist1": 1.0, "noise": end.sigma * drawn[1] * step.kept(1.0 - r2)}
    yield make_row(problem, points[0], second, to=points[1], anchor=last)
    last = {"anchor": 1.0, "D": end.alpha * weight, "noise": end.sigma * step.fresh(1.0 - r2)}
    yield make_row(problem, points[1], last, to=end)


def _difference(total: float, weight: float) -> float:
    """total - weight, and nothing where that is rounding alone."""
    left = total - weight
    return 0.0 if abs(left) < 1e-14 * abs(total) else left


PAPER = "Gonzalez et al. 2023, SEEDS: Exponential SDE Solvers for Fast High-Quality Sampling from Diffusion Models"

SEEDS_2 = MethodInfo(
    name="seeds_2",
    paper=PAPER,
    order=2,
    stochastic=True,
    evaluations_per_step=2,
    history=0,
    options={"r": 0.5, "eta": 1.0, "s_noise": 1.0, "solver": "midpoint"},
    rows=seeds_2,
)
SEEDS_3 = MethodInfo(
    name="seeds_3",
    paper=PAPER,
    order=3,
    stochastic=True,
    evaluations_per_step=3,
    history=1,
    options={"r1": 1.0 / 3.0, "r2": 2.0 / 3.0, "eta": 1.0, "s_noise": 1.0},
    rows=seeds_3,
)
