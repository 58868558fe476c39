"""UniPC. Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models"."""

from collections.abc import Sequence

from fastdiff.errors import InputError
from fastdiff.samplers.adams import PREDICTS, Orders, adams_rows
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, StepTable, choice, flag, make_table, whole

VARIANTS = ("bh1", "bh2")


def unipc(
    problem: Problem,
    *,
    order: int = 2,
    variant: str = "bh2",
    predict: str = "data",
    corrector: bool | Sequence[int] = True,
    simplified: bool = True,
    lower_order_final: bool = True,
) -> StepTable:
    """x' = (sigma'/sigma) x_c + alpha' int e^(-(lambda'-l)) P(l) dl, then x_c' = the same with P^c for P.

    lambda = log(alpha/sigma); P is the polynomial through the last `order` data predictions, P^c goes through D' at x'
    as well. D' is computed once, from the prediction x', and kept: the corrector raises the order by one and costs no
    evaluation. A row ends at x', and its anchor holds all of x_c' but the part of D'.

    order       1 to 3; the first steps have lower ones
    variant     "bh1", B(h) = h, or "bh2", B(h) = e^h - 1
    predict     what is interpolated: "data", D; "noise", epsilon, and
                x' = (alpha'/alpha) x_c - sigma' int e^(lambda'-l) P dl
    corrector   False: predictor alone; or the steps, counted from 0 with those that `strength` leaves out, whose result
                is not corrected
    simplified  the predictor of order 2 and the corrector of order 1 take B(h)/2 for the integral of their linear term,
                as the authors' code and diffusers do. False: all is exact, and the variant makes no difference
    lower_order_final   the order is at most the number of steps left, which makes the last one a first-order step and
                the whole method, where noise is left at the end, one of order 2

    A step to sigma' = 0 is of order 1. diffusers: predict_x0=False and bh1 end in NaN at sigma' = 0; solver_p, another
    scheduler in the predictor's place, has no counterpart.
    """
    whole("unipc", "order", order, 1, 3)
    choice("unipc", "variant", variant, VARIANTS)
    choice("unipc", "predict", predict, PREDICTS)
    flag("unipc", "simplified", simplified)
    flag("unipc", "lower_order_final", lower_order_final)
    steps = problem.grid.steps
    left = _uncorrected(corrector, steps, problem.grid.skipped)
    orders = []
    for i in range(steps):
        p = min(order, i + 1, steps - i if lower_order_final else order)
        orders.append(Orders(p, 0 if i in left else p + 1, variant if simplified else None))
    return make_table("unipc", problem, adams_rows(problem, predict, orders))


def _uncorrected(corrector: bool | Sequence[int], steps: int, skipped: int) -> set[int]:
    """The steps of the grid whose result is left as predicted; nothing is known yet that could correct the last."""
    if isinstance(corrector, bool):
        return {steps - 1} if corrector else set(range(steps))
    if not isinstance(corrector, list | tuple) or not all(type(i) is int and i >= 0 for i in corrector):
        raise InputError(
            f"unipc: corrector: expected True, False or the steps not to correct, such as [0, 1], got {corrector!r}"
        )
    return {*(i - skipped for i in corrector), steps - 1}


INFO = MethodInfo(
    name="unipc",
    paper="Zhao et al. 2023, UniPC: A Unified Predictor-Corrector Framework for Fast Sampling of Diffusion Models",
    order=2,
    stochastic=False,
    evaluations_per_step=1,
    history=1,
    options={
        "order": 2,
        "variant": "bh2",
        "predict": "data",
        "corrector": True,
        "simplified": True,
        "lower_order_final": True,
    },
    diffusers={"spacing": "linspace", "endpoint": False},
    rows=unipc,
)
