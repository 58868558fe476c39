"""Single-step exponential integrators: blocks of one to three network calls, each block ending at a new level.

Row j of a block calls the network at point j - 1 and takes the block's first state x_0 to point j:

    x_j = a_j x_0 + b_j q_0 + c_j sum_l w_jl (q_l - q_0) + noise, 1 <= l < j,

with a, b, c and w of `exponential`. The anchor carries what the last row needs of those before it.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fastdiff.samplers.euler import Split
from fastdiff.samplers.exponential import Data, Form, corrections, log_ratio
from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import Row, make_row
from fastdiff.samplers.terms import total

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
    """How far a step goes down before it adds noise: as `split` says, but not below `floor`.

    sde   whether the noise belongs to every row of a block, each of whose steps is one of the SDE; otherwise the block
          goes down without noise, and its last row adds it
    """

    split: Split
    s_noise: float = 1.0
    floor: float = 0.0
    sde: bool = False

    def last(self, start: Point, end: Point) -> Target:
        """The target of a block's last row."""
        down, up = self.split(start.ratio, end.ratio)
        if down < self.floor:
            down, up = self.floor, math.sqrt(max(end.ratio**2 - self.floor**2, 0.0))
        length = log_ratio(start.ratio, end.ratio if self.sde else down)
        return Target(end, down, up * self.s_noise, length)

    def inner(self, start: Point, point: Point) -> Target:
        """The target of another row."""
        if self.sde:
            return self.last(start, point)
        return Target(point, point.ratio, 0.0, log_ratio(start.ratio, point.ratio))


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

    brownian   whether the noises of its states are those of one path over r, from the start down to each; otherwise
               each state's is a new one
    """
    count = len(block.points)
    if count == 1:
        yield _only_row(problem, block)
        return
    states = [_state(block, form, j, curvature, brownian) for j in range(count)]
    for j, (point, state) in enumerate(zip(block.points, states, strict=True)):
        q, z = form.quantity(problem, point), {"noise": 1.0}
        to = block.targets[j].point
        if j == count - 1:
            new_x = total((1.0, {"anchor": 1.0}), (state.q[j], q), (state.z[j], z))
            yield make_row(problem, point, new_x, to=to)
            return
        if j == 0:
            x_0, known, drawn = {"x": 1.0}, [q], [z]
        else:
            x_0, known = {"anchor": 1.0}, [{"hist1": 1.0}, q]
            drawn = [_first_noise(states[0]), z]
        prepares_last = j == count - 2
        yield make_row(
            problem,
            point,
            state.terms(x_0, known, drawn),
            to=to,
            anchor=states[-1].terms(x_0, known, drawn) if prepares_last else x_0,
            history=None if prepares_last else q,
        )


def _only_row(problem: Problem, block: Block) -> Row:
    """In D, which is the same as in epsilon, and finite without signal and at the data."""
    start, target = block.points[0], block.targets[0]
    step = Data.propagate(start, target.point.alpha, target.ratio)
    new_x = {"x": step.x, "D": step.q, "noise": target.point.alpha * target.up}
    return make_row(problem, start, new_x, to=target.point)


@dataclass(frozen=True)
class State:
    """The state that a row leads to: x * x_0 + sum of q_l times `q` + sum of the rows' z_i times `z`."""

    x: float
    q: list[float]
    z: list[float]

    def terms(self, x_0: Coefficients, known: list[Coefficients], drawn: list[Coefficients]) -> Coefficients:
        """The part of it that is known: the last row's q and z may be missing."""
        return total((self.x, x_0), *zip(self.q, known, strict=False), *zip(self.z, drawn, strict=False))


def _state(block: Block, form: Form, j: int, curvature: str, brownian: bool) -> State:
    """The state that row j (from 0) leads to."""
    start, target = block.points[0], block.targets[j]
    step = form.propagate(start, target.point.alpha, target.ratio)
    nodes = [log_ratio(start.ratio, point.ratio) / target.length for point in block.points[1 : j + 1]]
    weights = [step.scale * w for w in corrections(nodes, step.z, block.solvers[j], curvature)]
    shares = [0.0] * j + [1.0]
    if brownian:
        fallen = [start.ratio - other.point.ratio for other in block.targets[: j + 1]]
        shares = [math.sqrt((to - since) / fallen[-1]) for since, to in pairwise([0.0, *fallen])]
    size = target.point.alpha * target.up
    first = step.q - math.fsum(weights)
    # The midpoint rule leaves nothing of the first but rounding, which is not worth reading an input for.
    first = 0.0 if abs(first) < 1e-14 * abs(step.q) else first
    return State(step.x, [first, *weights], [size * share for share in shares])


def _first_noise(first: State) -> Coefficients:
    """The first row's z in the second row: what its x has beyond its other terms."""
    (size,) = first.z
    if size == 0.0:
        return {}
    return total((1.0 / size, {"x": 1.0}), (-first.x / size, {"anchor": 1.0}), (-first.q[0] / size, {"hist1": 1.0}))
