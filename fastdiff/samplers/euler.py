"""Euler, with stochastic churn, and Euler ancestral in y = x / alpha = x_0 + r epsilon, r = sigma / alpha.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 2; the ancestral step
is that of k-diffusion (Katherine Crowson).
"""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import pairwise

from fastdiff.errors import InputError
from fastdiff.samplers.churn import CHURN_OPTIONS, Churn, added_noise, churn_from
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, fraction, make_row, make_table

Split = Callable[[float, float], tuple[float, float]]
"""(r, r') -> (d, u): how a step is split into one down to d without noise, and noise of standard deviation u."""
INITIAL_STATES = ("unit", "sigma", "marginal")
CHURN_CALLS = ("raised", "before")


def euler(
    problem: Problem,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float | None = None,
    s_noise: float = 1.0,
    churn_call: str = "raised",
    initial: str = "unit",
) -> StepTable:
    """y' = (r'/r) y + (1 - r'/r) D, where churn has raised y and r (`churn.Churn`).

    s_churn, s_tmin, s_tmax, s_noise   those of `churn.Churn`
    churn_call  "raised": the network is called at the raised state. "before": at the state without the fresh noise, and
                its output is taken for that of the raised state, as diffusers does; for v, even D's two coefficients
                are those of the lower level.
    initial     of the noise to start with. "unit": the network's first input has variance 1, as x_T has where the
                schedule keeps the variance; "sigma": y has standard deviation r (diffusers with linspace and trailing
                spacing); "marginal": sqrt(1 + r^2), that of noised data of variance 1 (diffusers' EDM).
    """
    chosen = churn_from("euler", s_churn, s_tmin, s_tmax, s_noise)
    if choice("euler", "churn_call", churn_call, CHURN_CALLS) == "before" and chosen.s_churn > 0.0:
        return scaled_table("euler", problem, _rows_before(problem, chosen), initial=initial)
    return scaled_table("euler", problem, _rows(problem, chosen), initial=initial, churn=chosen)


def _rows(problem: Problem, chosen: Churn) -> Iterator[Row]:
    for step in chosen.steps(problem):
        shrink = step.end.ratio / step.start.ratio
        yield make_row(problem, step.start, step.raised({"x": shrink, "D": 1.0 - shrink}), to=step.to)


def _rows_before(problem: Problem, chosen: Churn) -> Iterator[Row]:
    if problem.bounded:
        raise InputError(
            "euler: churn_call: 'before' has no data prediction of the raised state that could be clipped; leave clip "
            "and dynamic_threshold out, or take churn_call='raised'"
        )
    for start, end in pairwise(problem.points(scaled=True)):
        raised = chosen.raise_level(problem, start)
        shrink = end.ratio / raised.ratio
        data = start.data if problem.prediction == "v" else raised.data
        keep = shrink + (1.0 - shrink) * data.x
        noise = chosen.s_noise * added_noise(start, raised)
        new_x = {"x": keep, "m": (1.0 - shrink) * data.m, "noise": keep * noise}
        anchor = None if raised is start else {"x": data.x, "m": data.m, "noise": data.x * noise}
        yield make_row(problem, start, new_x, to=end, anchor=anchor)


def euler_ancestral(problem: Problem, *, eta: float = 1.0, s_noise: float = 1.0, initial: str = "unit") -> StepTable:
    """y' = (d/r) y + (1 - d/r) D + u s_noise z, (d, u) = `ancestral_step`(r, r', eta).

    initial is that of `euler`.
    """
    eta = fraction("euler_ancestral", "eta", eta)
    s_noise = fraction("euler_ancestral", "s_noise", s_noise, high=10.0)
    rows = ancestral_rows(problem, partial(ancestral_step, eta=eta), s_noise)
    return scaled_table("euler_ancestral", problem, rows, initial=initial)


def ancestral_rows(problem: Problem, split: Split, s_noise: float) -> Iterator[Row]:
    """The rows of `euler_ancestral` whose steps are split like that."""
    for start, end in pairwise(problem.points(scaled=True)):
        down, up = split(start.ratio, end.ratio)
        shrink = down / start.ratio
        yield make_row(problem, start, {"x": shrink, "D": 1.0 - shrink, "noise": up * s_noise}, to=end)


def ancestral_step(r: float, r1: float, eta: float) -> tuple[float, float]:
    """(d, u): r'^2 = d^2 + u^2, u = min(r', eta r' sqrt(1 - r'^2/r^2)): go down to d without noise, then add u z."""
    q = r1 / r
    up = min(r1, eta * r1 * math.sqrt(max(1.0 - q * q, 0.0)))
    # r'^2 - u^2 without the difference of two nearly equal numbers.
    return r1 * math.sqrt(max((1.0 - eta) * (1.0 + eta) + (eta * q) ** 2, 0.0)), up


def scaled_table(
    method: str, problem: Problem, rows: Iterable[Row], *, initial: str = "unit", churn: Churn | None = None
) -> StepTable:
    """The table of a method whose state is y = x / alpha."""
    choice(method, "initial", initial, INITIAL_STATES)
    first = problem.points(scaled=True)[0]
    scale = {"unit": first.init_scale, "sigma": first.ratio, "marginal": math.hypot(1.0, first.ratio)}[initial]
    return make_table(method, problem, rows, init_scale=churn.init_scale(problem, scale) if churn else scale)


DIFFUSERS = {"spacing": "linspace", "integer": False, "interpolation": "linear", "initial": "sigma"}

EULER = MethodInfo(
    name="euler",
    paper="Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models",
    order=1,
    stochastic=False,
    evaluations_per_step=1,
    history=0,
    options={**CHURN_OPTIONS, "churn_call": "raised", "initial": "unit"},
    diffusers={**DIFFUSERS, "churn_call": "before"},
    rows=euler,
)
EULER_ANCESTRAL = MethodInfo(
    name="euler_ancestral",
    paper="Crowson 2022, k-diffusion; Karras et al. 2022",
    order=1,
    stochastic=True,
    evaluations_per_step=1,
    history=0,
    options={"eta": 1.0, "s_noise": 1.0, "initial": "unit"},
    diffusers=DIFFUSERS,
    rows=euler_ancestral,
)
