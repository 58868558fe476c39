"""DPM-Solver++ backwards: from an image to the noise that leads to it.

Lu et al. 2022, "DPM-Solver++", algorithm 2, over a rising grid.
"""

from collections.abc import Iterator

from fastdiff.samplers.exponential import SOLVERS, Data
from fastdiff.samplers.multistep import LOWERED, Step, plan, step_row
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, make_row, make_table, whole
from fastdiff.samplers.terms import ddim_step, epsilon

CURVATURES = ("exact", "half")


def dpmpp_inverse(
    problem: Problem,
    *,
    order: int = 2,
    solver: str = "midpoint",
    curvature: str = "exact",
    lower_order_final: bool | None = None,
    euler_at_final: bool = False,
) -> StepTable:
    """The steps of `dpmpp_2m` (order 1 or 2) or `dpmpp_3m` (order 3) up a rising grid, where h < 0.

    The step from sigma = 0, where lambda is infinite, is DDIM's, as is one to no signal; the network has to determine
    epsilon at sigma = 0, so a prediction of the sample needs final_sigma="schedule". The options are those of the two.
    """
    order = whole("dpmpp_inverse", "order", order, 1, 3)
    choice("dpmpp_inverse", "solver", solver, SOLVERS)
    choice("dpmpp_inverse", "curvature", curvature, CURVATURES)
    steps = plan("dpmpp_inverse", problem, order, lower_order_final=lower_order_final, euler_at_final=euler_at_final)
    return make_table("dpmpp_inverse", problem, _rows(problem, steps, solver, curvature))


def _rows(problem: Problem, steps: list[Step], solver: str, curvature: str) -> Iterator[Row]:
    for step in steps:
        start, end = step.start, step.end
        if step.nodes:
            propagation = Data.propagate(start, end.alpha, end.ratio)
            yield step_row(problem, step, Data, propagation, solver, curvature=curvature)
        else:
            # DDIM, written so that neither end needs a finite lambda.
            ddim = ddim_step(end, epsilon(problem, start))
            yield make_row(problem, start, ddim, to=end, history={"D": 1.0} if step.kept else None)


INFO = MethodInfo(
    name="dpmpp_inverse",
    paper="Lu et al. 2022, DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
    order=2,
    stochastic=False,
    evaluations_per_step=1,
    history=1,
    options={"order": 2, "solver": "midpoint", "curvature": "exact", **LOWERED},
    diffusers={"spacing": "linspace", "endpoint": False, "final_sigma": "schedule", "curvature": "half"},
    rows=dpmpp_inverse,
    inverse=True,
)
