"""Exponential integrators in lambda = log(alpha/sigma): what DPM-Solver and DPM-Solver++ have in common.

A step from (alpha, sigma) to (alpha', sigma') takes the state to

    x' = a x + b q_0 + c sum_l w_l (q_l - q_0),

q the data prediction D (`Data`) or epsilon (`Noise`) where it is known: q_0 at the start, q_l at other points.
Lu et al. 2022, "DPM-Solver" (equation 3.4) and "DPM-Solver++" (equation 8).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.terms import epsilon

SOLVERS = ("midpoint", "heun")


class Propagation(NamedTuple):
    """a, b and c of a step, and z: the argument of the weights w, `corrections(nodes, z, ...)`."""

    x: float
    q: float
    scale: float
    z: float


class Data:
    """q = D: x' = (s'/sigma) x + alpha' k int_0^1 e^(-k (1 - u)) D du, s' = alpha' r', k = log(r / r').

    r = sigma/alpha. r' may be less than the level that the state ends at, where noise makes up for the rest.
    """

    @staticmethod
    def quantity(problem: Problem, point: Point) -> dict[str, float]:
        return {"D": 1.0}

    @staticmethod
    def propagate(start: Point, alpha: float, ratio: float) -> Propagation:
        k = log_ratio(start.ratio, ratio)
        return Propagation(alpha * ratio / start.sigma, alpha * (1.0 - ratio / start.ratio), alpha * k, -k)


class Noise:
    """q = epsilon: x' = (alpha'/alpha) x - g sigma' h int_0^1 e^(h (1 - u)) epsilon du, h = log(r / r').

    g = 1 is the flow; 1 + eta an SDE's mean.
    """

    @staticmethod
    def quantity(problem: Problem, point: Point) -> dict[str, float]:
        return epsilon(problem, point)

    @staticmethod
    def propagate(start: Point, alpha: float, ratio: float, gain: float = 1.0) -> Propagation:
        h = log_ratio(start.ratio, ratio)
        grown = alpha / start.alpha if start.alpha else math.inf
        return Propagation(grown, -gain * alpha * (start.ratio - ratio), -gain * alpha * ratio * h, h)


Form = type[Data] | type[Noise]


def log_ratio(r: float, r1: float) -> float:
    """log(r / r1): how far lambda rises; infinite where one of the two is 0 or infinite."""
    if 0.0 < r < math.inf and 0.0 < r1 < math.inf:
        return math.log(r / r1)
    return math.inf if r1 < r else -math.inf


def phi(n: int, z: float) -> float:
    """phi_1 = (e^z - 1)/z, phi_n = (phi_(n-1) - 1/(n-1)!)/z; int_0^1 e^(z (1 - u)) u^(n-1)/(n-1)! du = phi_n(z)."""
    if abs(z) < 1.0:
        # The recursion would subtract nearly equal numbers.
        return math.fsum(z**j / math.factorial(j + n) for j in range(20))
    value = math.expm1(z) / z
    for j in range(1, n):
        value = (value - 1.0 / math.factorial(j)) / z
    return value


# The weight of the second divided difference of three q's. "exact" integrates the parabola through them; the others are
# what peers have in its place.
CURVATURES: Mapping[str, Callable[[float], float]] = {
    "exact": lambda z: 2.0 * phi(3, z),
    "half": lambda z: phi(3, z),
    "offset": lambda z: 2.0 * (phi(3, z) + 1.0 / z),
    "half_offset": lambda z: phi(3, z) + 1.0 / z,
}


def corrections(nodes: Sequence[float], z: float, solver: str, curvature: str = "exact") -> list[float]:
    """w_l, so that phi_1(z) q_0 + sum_l w_l (q_l - q_0) is int_0^1 e^(z (1 - u)) q(u) du to the order of the nodes.

    nodes       u_l where q_l is known, q_0 at u = 0: in units of the step, negative for earlier steps. One node gives
                order 2, two give order 3.
    solver      of one node: phi_2 (q_1 - q_0)/u_1 for "heun", phi_1/2 in place of phi_2 for "midpoint". Of two nodes:
                the parabola through all three for "heun"; phi_2 (q_2 - q_0)/u_2 for "midpoint", which is of order 3
                only if u_2 = 2/3.
    curvature   of the parabola, one of CURVATURES
    """
    if not nodes:
        return []
    if len(nodes) == 1:
        return [(phi(1, z) / 2.0 if solver == "midpoint" else phi(2, z)) / nodes[0]]
    u, v = nodes
    if solver == "midpoint":
        return [0.0, phi(2, z) / v]
    bend = CURVATURES[curvature](z)
    return [(phi(2, z) * v - bend) / (u * (v - u)), (bend - phi(2, z) * u) / (v * (v - u))]
