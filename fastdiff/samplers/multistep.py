"""Multistep exponential integrators: which earlier predictions a step reads, and its row."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastdiff.samplers.exponential import Form, Propagation, combine, corrections, log_ratio
from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import Row, make_row


@dataclass(frozen=True)
class Step:
    """From `start`, where the network is called, to `end`; the state then goes on from `to`, which churn makes noisier.

    nodes   where the earlier predictions that the step reads lie, in units of its length in lambda, the last one first
    kept    whether a later step reads this one's prediction
    """

    start: Point
    end: Point
    to: Point
    nodes: tuple[float, ...]
    kept: bool

    @property
    def decay(self) -> float:
        """e^-h, h the step in lambda."""
        return self.end.ratio / self.start.ratio


def plan(
    problem: Problem,
    order: int,
    *,
    lower_order_final: bool | None = None,
    euler_at_final: bool = False,
    starts: Sequence[Point] | None = None,
) -> list[Step]:
    """The steps between the grid's points, each of the highest order up to `order` that its past allows.

    The first step is of order 1, as is one after a point without signal, where lambda is infinite, and one to
    sigma' = 0; the step after it is of order 2.
    lower_order_final   whether the last step is of order 1 and the one before it of order 2 in any case; None: where
                        there are fewer than 15 steps
    euler_at_final      whether the last step is of order 1 in any case
    starts              where the network is called, if not at the points themselves; one for each step
    """
    *points, last = problem.points()
    starts, ends = list(starts or points), [*points[1:], last]
    steps = len(ends)
    lowered = steps + problem.grid.skipped < 15 if lower_order_final is None else lower_order_final
    orders: list[int] = []
    past = 0
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        # Nothing is extrapolated from a point without signal, nor to a start that churn raised above the last one.
        follows = i > 0 and start.ratio < starts[i - 1].ratio < math.inf
        past = past + 1 if follows else 0
        highest = min(order, past + 1, steps - i if lowered else order)
        # A step of no length changes nothing, whatever its order.
        first_order = end.ratio in (0.0, start.ratio) or (euler_at_final and i == steps - 1)
        orders.append(1 if first_order else highest)
    result = []
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        h = log_ratio(start.ratio, end.ratio)
        nodes = tuple(log_ratio(start.ratio, starts[i - j].ratio) / h for j in range(1, orders[i]))
        kept = any(orders[i + j] > j for j in (1, 2) if i + j < steps)
        result.append(Step(start, end, starts[i + 1] if i + 1 < steps else end, nodes, kept))
    return result


def step_row(
    problem: Problem,
    step: Step,
    form: Form,
    propagation: Propagation,
    solver: str,
    *,
    noise: float = 0.0,
    churn_noise: float = 1.0,
    curvature: str = "exact",
) -> Row:
    """The row of a step: noise * z is added at its end, churn_noise * z (in units of what is missing) to raise it."""
    quantity = form.quantity(problem, step.start)
    past = {f"hist{j}": 1.0 for j in range(1, len(step.nodes) + 1)}
    # The solver is that of one node; through two earlier ones there is only the parabola.
    solver = "heun" if len(step.nodes) == 2 else solver
    weights = [propagation.scale * w for w in corrections(step.nodes, propagation.z, solver, curvature)]
    new_x = combine(
        [
            (propagation.x, {"x": 1.0}),
            (propagation.q - math.fsum(weights), quantity),
            *((weight, {name: 1.0}) for weight, name in zip(weights, past, strict=True)),
            (noise, {"noise": 1.0}),
        ]
    )
    if step.to is not step.end:
        raised = step.to.alpha * math.sqrt(step.to.ratio**2 - step.end.ratio**2)
        new_x = combine([(step.to.alpha / step.end.alpha, new_x), (raised * churn_noise, {"noise": 1.0})])
    return make_row(problem, step.start, new_x, to=step.to, history=quantity if step.kept else None)
