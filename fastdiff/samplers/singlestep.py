"""Single-step exponential integrators: blocks of one to three network calls, each block ending at a new level.

Row j of a block calls the network at point j - 1 and takes the block's first state x_0 to point j:

    x_j = a_j x_0 + b_j q_0 + c_j sum_l w_jl (q_l - q_0) + s_j z, 1 <= l < j,

with a, b, c and w of `exponential`. The anchor carries what the last row needs of those before it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fastdiff.samplers.euler import ancestral_step
from fastdiff.samplers.exponential import Data, Form, combine, corrections, log_ratio
from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import Row, make_row

Coefficients = dict[str, float]


@dataclass(frozen=True)
class Target:
    """A point that a row leads to.

    ratio    r' = sigma'/alpha' that is reached without noise
    up       the noise that is added then: ratio^2 + up^2 is the point's own ratio^2
    length   in lambda, of the step that the nodes are measured in
    """

    point: Point
    ratio: float
    up: float
    length: float


@dataclass(frozen=True)
class Aim:
    """How far a step goes down before it adds noise: `euler.ancestral_step`, but not below `floor`.

    sde   whether the noise belongs to every row of a block, each of whose steps is one of the SDE; otherwise the block
          goes down without noise, and its last row adds it
    """

    eta: float = 0.0
    s_noise: float = 1.0
    floor: float = 0.0
    sde: bool = False

    def last(self, start: Point, end: Point) -> Target:
        """The target of a block's last row."""
        down, up = ancestral_step(start.ratio, end.ratio, self.eta)
        if down < self.floor:
            down, up = self.floor, math.sqrt(max(end.ratio**2 - self.floor**2, 0.0))
        length = log_ratio(start.ratio, end.ratio if self.sde else down)
        return Target(end, down, up * self.s_noise, length)

    def inner(self, start: Point, point: Point) -> Target:
        """The target of another row."""
        return (
            self.last(start, point)
            if self.sde
            else Target(point, point.ratio, 0.0, log_ratio(start.ratio, point.ratio))
        )


@dataclass(frozen=True)
class Block:
    """The network is called at each of the points; row j leads from points[0] to targets[j] by solvers[j]."""

    points: tuple[Point, ...]
    targets: tuple[Target, ...]
    solvers: tuple[str, ...]


def block_between(problem: Problem, start: Point, end: Point, aim: Aim, nodes: Sequence[float], solver: str) -> Block:
    """The block of a step whose inner points lie at `nodes` of its length in lambda."""
    last = aim.last(start, end)
    inner = [problem.at_ratio(start.ratio * math.exp(-node * last.length)) for node in nodes]
    # The second inner state takes the exact weights whatever the solver: Lu et al. 2022, algorithm 2.
    solvers = ("heun",) * len(inner) + (solver,)
    return Block((start, *inner), (*(aim.inner(start, point) for point in inner), last), solvers)


def block_of(points: Sequence[Point], aim: Aim, solver: str) -> Block:
    """The block from points[0] to points[-1] whose inner points are the others."""
    start, *inner, end = points
    targets = (*(aim.inner(start, point) for point in inner), aim.last(start, end))
    return Block((start, *inner), targets, (solver,) * len(targets))


def block_rows(
    problem: Problem, block: Block, form: Form, *, brownian: bool = False, curvature: str = "exact"
) -> Iterator[Row]:
    """The rows of a block.

    brownian   whether the noises of the rows are those of one path M from x_0, x_j = a_j (x_0 + M_j) + ..., whose
               increments are independent; otherwise the z of the rows are independent
    """
    count = len(block.points)
    if count == 1:
        yield _only_row(problem, block)
        return
    steps = [_weights(block, form, j, curvature) for j in range(count)]
    fresh = [target.point.alpha * target.up for target in block.targets]
    carried = [0.0] * count
    if brownian:
        carried = _increments(steps, fresh)
        fresh = [a * increment for (a, _), increment in zip(steps, carried, strict=True)]
    for j, (point, target) in enumerate(zip(block.points, block.targets, strict=True)):
        q, noise = form.quantity(problem, point), (fresh[j], {"noise": 1.0})
        if j == count - 1:
            new_x = combine([(1.0, {"anchor": 1.0}), (steps[j][1][j], q), noise])
            yield make_row(problem, point, new_x, to=target.point)
            return
        x_0, known = ({"x": 1.0}, [q]) if j == 0 else ({"anchor": 1.0}, [{"hist1": 1.0}, q])
        path = combine([(1.0, x_0), (carried[j], {"noise": 1.0})])
        prepares_last = j == count - 2
        yield make_row(
            problem,
            point,
            combine([*_terms(steps[j], x_0, known), noise]),
            to=target.point,
            anchor=combine(_terms(steps[-1], path, known)) if prepares_last else path,
            history=None if prepares_last else q,
        )


def _only_row(problem: Problem, block: Block) -> Row:
    """In D, which is the same as in epsilon, and finite without signal and at the data."""
    start, target = block.points[0], block.targets[0]
    step = Data.propagate(start, target.point.alpha, target.ratio)
    new_x = {"x": step.x, "D": step.q, "noise": target.point.alpha * target.up}
    return make_row(problem, start, new_x, to=target.point)


def _weights(block: Block, form: Form, j: int, curvature: str) -> tuple[float, list[float]]:
    """a_j and the factors of q_0 ... q_j in the state that row j leads to."""
    start, target = block.points[0], block.targets[j]
    step = form.propagate(start, target.point.alpha, target.ratio)
    nodes = [log_ratio(start.ratio, point.ratio) / target.length for point in block.points[1 : j + 1]]
    weights = [step.scale * w for w in corrections(nodes, step.z, block.solvers[j], curvature)]
    return step.x, [step.q - math.fsum(weights), *weights]


def _terms(
    step: tuple[float, list[float]], x_0: Coefficients, known: list[Coefficients]
) -> list[tuple[float, Coefficients]]:
    """a x_0 and what is known of the q_l, each with its factor."""
    a, factors = step
    return [(a, x_0), *zip(factors, known, strict=False)]


def _increments(steps: list[tuple[float, list[float]]], sizes: list[float]) -> list[float]:
    """Standard deviations of the increments of M, whose variance at row j is (s_j / a_j)^2."""
    variances = [0.0, *((size / a) ** 2 for (a, _), size in zip(steps, sizes, strict=True))]
    return [math.sqrt(max(later - earlier, 0.0)) for earlier, later in pairwise(variances)]
