"""DEIS. Zhang and Chen 2023, "Fast Sampling of Diffusion Models with Exponential Integrator"."""

from fastdiff.samplers.adams import Orders, adams_rows
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, StepTable, automatic_flag, make_table, whole


def deis(problem: Problem, *, order: int = 2, lower_order_final: bool | None = None) -> StepTable:
    """x'/alpha' = x/alpha + int P(log r) dr from r to r', r = sigma/alpha.

    P is the polynomial in log r through the last `order` values of epsilon: the paper's AB-DEIS, which has it in r
    (rhoAB) or t (tAB), in the variable of diffusers ("logrho").

    order               1 to 4; the first steps have lower ones
    lower_order_final   whether the order is at most the number of steps left; None: where there are fewer than 15, with
                        those that `strength` leaves out

    A step to sigma' = 0 is of order 1. diffusers: orders 1 to 3, and the last step ends at the schedule's own end.
    """
    whole("deis", "order", order, 1, 4)
    automatic_flag("deis", "lower_order_final", lower_order_final)
    steps = problem.grid.steps
    lower = steps + problem.grid.skipped < 15 if lower_order_final is None else lower_order_final
    orders = [Orders(min(order, i + 1, steps - i if lower else order)) for i in range(steps)]
    return make_table("deis", problem, adams_rows(problem, "noise", orders))


INFO = MethodInfo(
    name="deis",
    paper="Zhang and Chen 2023, Fast Sampling of Diffusion Models with Exponential Integrator",
    order=2,
    stochastic=False,
    evaluations_per_step=1,
    history=1,
    options={"order": 2, "lower_order_final": None},
    diffusers={"spacing": "linspace", "endpoint": False, "final_sigma": "schedule"},
    rows=deis,
)
