"""Euler on the straight path x = (1 - t) x_0 + t epsilon.

Lipman et al. 2023, "Flow Matching for Generative Modeling"; Liu et al. 2023, "Flow Straight and Fast".
"""

from collections.abc import Iterator
from itertools import pairwise

from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, make_row, make_table


def flow_euler(problem: Problem) -> StepTable:
    """x' = x + (t' - t) u; with u = (x - D)/t where D is predicted or clipped: x' = (t'/t) x + (1 - t'/t) D."""
    return make_table("flow_euler", problem, _rows(problem))


def _rows(problem: Problem) -> Iterator[Row]:
    direct = problem.prediction == "flow" and not problem.bounded
    for start, end in pairwise(problem.points()):
        t, t1 = start.sigma, end.sigma
        new_x = {"x": 1.0, "m": t1 - t} if direct else {"x": t1 / t, "D": 1.0 - t1 / t}
        yield make_row(problem, start, new_x, to=end)


INFO = MethodInfo(
    name="flow_euler",
    paper="Lipman et al. 2023, Flow Matching for Generative Modeling; Esser et al. 2024 (the shift)",
    order=1,
    stochastic=False,
    evaluations_per_step=1,
    history=0,
    options={},
    kinds=("flow",),
    diffusers={"spacing": "linspace"},
    rows=flow_euler,
)
