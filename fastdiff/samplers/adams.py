"""Exponential Adams methods in lambda = log(alpha/sigma): f = D or epsilon is interpolated, the rest is integrated.

DEIS, UniPC and SA-Solver differ in the order of the interpolation, in what they interpolate, in their corrector and in
their noise; the integrals and the rows are the same.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import Coefficients, Row, make_row
from fastdiff.schedules import Array

PREDICTS = ("data", "noise")


@dataclass(frozen=True)
class Interval:
    """The exact solution from `start` to `end`, h = lambda' - lambda, k = 1 + tau^2.

    data    x' = (sigma'/sigma) e^(-tau^2 h) x + k alpha' int e^(-k(lambda'-l)) D dl + sigma' sqrt(1 - e^(-2 tau^2 h)) z
    noise   x' = (alpha'/alpha) x - k sigma' int e^(lambda'-l) epsilon dl + tau sigma' sqrt(e^(2h) - 1) z

    tau = 0 is the probability-flow ODE, tau = 1 the reverse SDE. Xue et al. 2023, "SA-Solver". A weight is what a
    value of f is multiplied by, the factor before the integral included.
    """

    start: Point
    end: Point
    data: bool
    tau: float = 0.0

    @property
    def decay(self) -> float:
        """e^-h; 0 where the step starts without signal or ends without noise."""
        return self.end.ratio / self.start.ratio

    @property
    def length(self) -> float:
        """h."""
        return math.inf if self.decay == 0.0 else -math.log(self.decay)

    @property
    def spread(self) -> float:
        """alpha' sigma / alpha: the noise that x is left with where only its signal is scaled."""
        return self.end.alpha * self.start.ratio

    @property
    def carry(self) -> float:
        """What x is multiplied by."""
        if self.data:
            return self.end.sigma / self.start.sigma * self.decay**self.tau**2
        return self.end.alpha / self.start.alpha

    @property
    def noise(self) -> float:
        """What z is multiplied by."""
        if self.data:
            return self.end.sigma * math.sqrt(max(1.0 - self.decay ** (2.0 * self.tau**2), 0.0))
        return self.tau * math.sqrt(max(self.spread**2 - self.end.sigma**2, 0.0)) if self.tau else 0.0

    @property
    def factor(self) -> float:
        """What stands before the integral."""
        return (1.0 + self.tau**2) * (self.end.alpha if self.data else -self.end.sigma)

    @property
    def total(self) -> float:
        """The weight of a constant f."""
        if self.data:
            return self.end.alpha * (1.0 - self.decay ** (1.0 + self.tau**2))
        return -(1.0 + self.tau**2) * (self.spread - self.end.sigma)

    def weights(self, nodes: Sequence[Point]) -> list[float]:
        """Of f at the nodes, for the polynomial through them. Nodes without signal drop out, as in the limit."""
        positions = [_log_snr(node) for node in nodes]
        finite = [i for i, position in enumerate(positions) if math.isfinite(position)]
        result = [0.0] * len(nodes)
        if len(finite) < 2:
            result[finite[0] if finite else 0] = self.total
            return result
        h, origin = self.length, _log_snr(self.start)
        if h == 0.0:
            return result
        units = [(positions[i] - origin) / h for i in finite]
        integrals = _moments(h * (1.0 + self.tau**2 if self.data else -1.0), len(units))
        for i, unit in zip(finite, units, strict=True):
            others = [other for other in units if other != unit]
            polynomial = np.polynomial.polynomial.polyfromroots(others)
            scale = math.prod(unit - other for other in others)
            result[i] = self.factor * h * float(polynomial @ integrals) / scale
        return result


def _log_snr(point: Point) -> float:
    return -math.log(point.ratio) if point.ratio else math.inf


def _moments(z: float, count: int) -> Array:
    """int_0^1 e^(-z (1 - u)) u^j du = j! phi_{j+1}(-z) for j < count, phi as Hochbruck and Ostermann 2010 define it."""
    if abs(z) < 1.0:
        powers = (-z) ** np.arange(20)
        factors = [[math.factorial(j) / math.factorial(j + n + 1) for n in range(20)] for j in range(count)]
        return np.asarray(factors) @ powers
    values = [-math.expm1(-z) / z]
    for j in range(1, count):
        values.append((1.0 - j * values[-1]) / z)
    return np.asarray(values)


@dataclass(frozen=True)
class Orders:
    """Of one step: how many values of f the predictor and the corrector interpolate (corrector 0: there is none).

    half    where two values are interpolated, the weight of their difference's end value is half of B(h) and not its
            integral: B(h) is the factor before the integral times h ("bh1"), or the weight of a constant ("bh2");
            Zhao et al. 2023. None: always the integral
    """

    predictor: int
    corrector: int = 0
    half: str | None = None


def predictor_weights(interval: Interval, before: Sequence[Point], half: str | None) -> list[float]:
    """Of f at the points up to the start of the interval, the newest first."""
    if half is None or len(before) != 2:
        return interval.weights(before)
    distance = _log_snr(before[1]) - _log_snr(interval.start)
    second = 0.5 * _scale(interval, half) * interval.length / distance
    return [interval.total - second, second]


def corrector_weights(interval: Interval, before: Sequence[Point], half: str | None) -> list[float]:
    """Of f at the end of the interval, and at the points before it."""
    nodes = [interval.end, *before]
    scale = math.inf if half is None else _scale(interval, half)
    if len(nodes) != 2 or not math.isfinite(scale):
        return interval.weights(nodes)
    return [0.5 * scale, interval.total - 0.5 * scale]


def _scale(interval: Interval, half: str) -> float:
    """The factor before the integral times B."""
    return interval.total if half == "bh2" else interval.factor * interval.length


@dataclass(frozen=True)
class _Step:
    """x' = carry x + predictor . (f, f1, f2, f3) + data D + noise z, and corrector[0] f' + known for the corrected x'.

    known = carry x + corrector[1:] . (f, f1, f2, f3) + noise z; corrector is empty where nothing is corrected.
    """

    carry: float
    predictor: Sequence[float]
    corrector: Sequence[float]
    data: float
    noise: float

    @property
    def history(self) -> int:
        """How many earlier values of f are read."""
        values = (self.predictor, self.corrector[1:])
        return max(max((i for i, weight in enumerate(block) if weight != 0.0), default=0) for block in values)


def adams_rows(
    problem: Problem,
    predict: str,
    orders: Sequence[Orders],
    tau: Callable[[Point], float] = lambda _: 0.0,
    *,
    s_noise: float = 1.0,
    pece: bool = False,
) -> Iterator[Row]:
    """One row a step. With x_c = anchor + corrector[0] f, or x where nothing is corrected, a row takes x_c to the
    prediction of the next state and to the part of its correction that is known already: the next anchor.

    f is computed from x, the prediction. A step to sigma' = 0 is of order 1 and adds no noise.

    s_noise   the noise is multiplied by it
    pece      whether f is computed again, from x_c: a corrected step has a row more, which takes x to x_c
    """
    points, data = problem.points(), predict == "data"
    steps = [_step(points[: i + 2], data, order, tau(points[i])) for i, order in enumerate(orders)]
    state: Coefficients = {"x": 1.0}
    for i, step in enumerate(steps):
        start, end = points[i], points[i + 1]
        f = {"D": 1.0} if data else _noise(problem, start)
        values = [f, {"hist1": 1.0}, {"hist2": 1.0}, {"hist3": 1.0}]
        if i > 0 and steps[i - 1].corrector:
            state = _sum([(1.0, {"anchor": 1.0}), (steps[i - 1].corrector[0], f)])
            if pece:
                yield make_row(problem, start, state, to=start)
                state = {"x": 1.0}
        else:
            state = {"x": 1.0}
        moved = [(step.carry, state), (step.noise * s_noise, {"noise": 1.0})]
        new_x = _sum([*moved, (step.data, {"D": 1.0}), *zip(step.predictor, values, strict=False)])
        known = _sum([*moved, *zip(step.corrector[1:], values, strict=False)]) if step.corrector else None
        read = any(later.history >= 1 + k for k, later in enumerate(steps[i + 1 :]))
        yield make_row(problem, start, new_x, to=end, anchor=known, history=f if read else None)


def _step(points: Sequence[Point], data: bool, orders: Orders, tau: float) -> _Step:
    *_, start, end = points
    before = points[-2::-1]
    if start.alpha == 0.0 and not data:
        # x is all noise: epsilon follows from it, and the data come from D.
        return _Step(0.0, [end.sigma], [], end.alpha, math.inf if tau else 0.0)
    interval = Interval(start, end, data, tau if end.sigma else 0.0)
    order = orders.predictor if end.sigma else 1
    predictor = predictor_weights(interval, before[:order], orders.half)
    corrector = []
    if orders.corrector:
        corrector = corrector_weights(interval, before[: orders.corrector - 1], orders.half)
    return _Step(interval.carry, predictor, corrector, 0.0, interval.noise)


def _noise(problem: Problem, point: Point) -> Coefficients:
    """epsilon: the one that leads from x to the bounded D, or the network's own."""
    if problem.bounded:
        return {"x": 1.0 / point.sigma, "D": -point.alpha / point.sigma}
    return {"x": point.noise.x, "m": point.noise.m}


def _sum(terms: Sequence[tuple[float, Coefficients]]) -> Coefficients:
    result: dict[str, float] = {}
    for factor, coefficients in terms:
        for name, value in coefficients.items():
            result[name] = result.get(name, 0.0) + factor * value
    return result
