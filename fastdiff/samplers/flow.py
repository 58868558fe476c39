"""Euler on the straight path x = (1 - t) x_0 + t epsilon.

Lipman et al. 2023, "Flow Matching for Generative Modeling"; Liu et al. 2023, "Flow Straight and Fast".
"""

from collections.abc import Iterator

from fastdiff import parameterization
from fastdiff.errors import InputError
from fastdiff.samplers.table import MethodInfo, Problem, StepTable, make_row, make_table
from fastdiff.schedules import Array


def flow_euler(problem: Problem) -> StepTable:
    """x' = x + (t' - t) u; with u = (x - D)/t where D is predicted or clipped: x' = (t'/t) x + (1 - t'/t) D."""
    if problem.schedule.kind != "flow":
        raise InputError(f"flow_euler: needs a flow schedule, got {problem.schedule.name!r}; use euler or ddim")
    return make_table("flow_euler", problem, _rows(problem))


def _rows(problem: Problem) -> Iterator[Array]:
    t = problem.grid.sigmas
    direct = problem.prediction == "flow" and problem.clip is None
    for i in range(problem.grid.steps):
        data = parameterization.data(problem.prediction, problem.grid.alphas[i], t[i])
        ratio = t[i + 1] / t[i]
        new_x = {"x": 1.0, "m": t[i + 1] - t[i]} if direct else {"x": ratio, "D": 1.0 - ratio}
        yield make_row(data, new_x, clip=problem.clip)


INFO = MethodInfo(
    name="flow_euler",
    paper="Lipman et al. 2023, Flow Matching for Generative Modeling; Esser et al. 2024 (the shift)",
    order=1,
    stochastic=False,
    evaluations_per_step=1,
    history=0,
    options={},
    diffusers={"spacing": "linspace"},
    rows=flow_euler,
)
