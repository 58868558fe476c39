"""Multistep exponential integrators: which earlier predictions a step reads, and its row."""

import math
from dataclasses import dataclass

from fastdiff.samplers.churn import Churn, ChurnedStep
from fastdiff.samplers.exponential import Form, Propagation, corrections, log_ratio
from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import Row, automatic_flag, flag, make_row
from fastdiff.samplers.terms import total

NO_CHURN = Churn(s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0)
# Whether the last step is of order 1 and the one before it of order 2 in any case, None: where there are fewer than 15
# steps; and whether the last step is of order 1 in any case, however many there are.
LOWERED = {"lower_order_final": None, "euler_at_final": False}


@dataclass(frozen=True)
class Step:
    """A step of the grid and what it knows of the past.

    nodes   where the earlier predictions that the step reads lie, in units of its length in lambda, the last one first
    kept    whether a later step reads this one's prediction
    """

    churned: ChurnedStep
    nodes: tuple[float, ...]
    kept: bool

    @property
    def start(self) -> Point:
        return self.churned.start

    @property
    def end(self) -> Point:
        return self.churned.end

    @property
    def decay(self) -> float:
        """e^-h, h the step in lambda."""
        return self.end.ratio / self.start.ratio


def plan(
    method: str,
    problem: Problem,
    order: int,
    *,
    lower_order_final: bool | None,
    euler_at_final: bool,
    churn: Churn = NO_CHURN,
) -> list[Step]:
    """The steps of the grid, each of the highest order up to `order` that its past and LOWERED allow.

    The first step is of order 1, as is one after a point without signal or noise, where lambda is infinite, and one to
    such a point; the step after it is of order 2.
    """
    lower_order_final = automatic_flag(method, "lower_order_final", lower_order_final)
    flag(method, "euler_at_final", euler_at_final)
    churned = [*churn.steps(problem, scaled=False)]
    ratios, steps = [step.start.ratio for step in churned], len(churned)
    lowered = steps + problem.grid.skipped < 15 if lower_order_final is None else lower_order_final
    orders: list[int] = []
    past = 0
    for i, step in enumerate(churned):
        past = past + 1 if i > 0 and _follows(ratios[i - 1], ratios[i], step.end.ratio) else 0
        # A step of no length changes nothing, whatever its order.
        first_order = step.end.ratio in (0.0, ratios[i], math.inf) or (euler_at_final and i == steps - 1)
        orders.append(1 if first_order else min(order, past + 1, steps - i if lowered else order))
    result = []
    for i, step in enumerate(churned):
        h = log_ratio(ratios[i], step.end.ratio)
        nodes = tuple(log_ratio(ratios[i], ratios[i - j]) / h for j in range(1, orders[i]))
        kept = any(orders[i + j] > j for j in (1, 2) if i + j < steps)
        result.append(Step(step, nodes, kept))
    return result


def _follows(last: float, start: float, end: float) -> bool:
    """Whether a step can use what was known at `last`: where lambda is finite, and not ahead of it.

    A start that churn raised above the last one lies behind it.
    """
    return 0.0 < last < math.inf and (start < last) == (end < start)


def step_row(
    problem: Problem,
    step: Step,
    form: Form,
    propagation: Propagation,
    solver: str,
    *,
    noise: float = 0.0,
    curvature: str = "exact",
) -> Row:
    """The row of a step, which adds noise * z at its end; or churn's own where that raises the end."""
    quantity = form.quantity(problem, step.start)
    # The solver is that of one node; through two earlier ones there is only the parabola.
    solver = "heun" if len(step.nodes) == 2 else solver
    weights = [propagation.scale * w for w in corrections(step.nodes, propagation.z, solver, curvature)]
    new_x = total(
        *[
            (propagation.x, {"x": 1.0}),
            (propagation.q - math.fsum(weights), quantity),
            *((weight, {f"hist{j}": 1.0}) for j, weight in enumerate(weights, start=1)),
            (noise, {"noise": 1.0}),
        ]
    )
    to = step.churned.to
    if to is not step.end:
        new_x = step.churned.raised(new_x)
    return make_row(problem, step.start, new_x, to=to, history=quantity if step.kept else None)
