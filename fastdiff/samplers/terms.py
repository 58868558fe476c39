"""Rows as sums of terms: the noise prediction, and what a step makes of it."""

from collections.abc import Sequence

import numpy as np
from numpy.polynomial import Polynomial

from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import Coefficients

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the newest and the earlier slopes for equal steps, orders 1 to 4."""

SLOPES = ("needed", "all")
"""Which rows of a multistep method keep their slope: those of which a later one reads it, or all."""


def total(*terms: tuple[float, Coefficients]) -> dict[str, float]:
    """The sum of factor * coefficients."""
    result: dict[str, float] = {}
    for factor, coefficients in terms:
        for name, value in coefficients.items():
            result[name] = result.get(name, 0.0) + factor * value
    return result


def epsilon(problem: Problem, point: Point, *, clipped: bool = True) -> dict[str, float]:
    """The noise prediction at `point`: (x - alpha D) / sigma, which leads from x to the bounded D.

    The network's own where D is not bounded, where not `clipped`, and at sigma = 0.
    """
    signal, noise = point.level
    if problem.bounded and clipped and noise != 0.0:
        return {"x": 1.0 / noise, "D": -signal / noise}
    return {"x": point.noise.x, "m": point.noise.m}


def ddim_step(end: Point, noise: Coefficients) -> dict[str, float]:
    """x' = alpha' D + sigma' epsilon, epsilon given by its coefficients."""
    signal, level = end.level
    return total((signal, {"D": 1.0}), (level, noise))


def multistep(start: Point, end: Point, noise: Coefficients, weights: Sequence[float]) -> dict[str, float]:
    """x' = (alpha'/alpha) x + (sigma' - alpha' sigma/alpha) e, e = sum of weights * (epsilon, hist1, hist2, ...).

    Written as DDIM's step and a correction, so that a start without signal works where the weights are (1,).
    """
    first = ddim_step(end, noise)
    if len(weights) == 1:
        return first
    (signal, level), (signal1, level1) = start.level, end.level
    change = level1 - signal1 * level / signal
    earlier = [(change * weight, {f"hist{j}": 1.0}) for j, weight in enumerate(weights[1:], start=1)]
    return total((1.0, first), (change * (weights[0] - 1.0), noise), *earlier)


def lagrange_weights(nodes: Sequence[float], end: float) -> tuple[float, ...]:
    """1/h times the integrals, from nodes[0] to end = nodes[0] + h, of the Lagrange polynomials of the nodes.

    The nodes, newest first, are where a slope is known; the weights, which add up to 1, integrate a polynomial through
    all of them exactly: Adams-Bashforth's for steps of any length.
    """
    length = end - nodes[0]
    if length == 0.0 or len(nodes) == 1:
        return (1.0,)
    u = (np.asarray(nodes) - nodes[0]) / length
    weights = []
    for j, own in enumerate(u):
        others = np.delete(u, j)
        basis = Polynomial.fromroots(others) / np.prod(own - others)
        weights.append(float(basis.integ()(1.0)))
    return tuple(weights)
