"""The second-order midpoint method of k-diffusion (Katherine Crowson), after DPM-Solver-2, in y = x / alpha.

Lu et al. 2022, "DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps"; churn is
that of Karras et al. 2022, algorithm 2.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise

from fastdiff.samplers.churn import CHURN_OPTIONS, churn_from
from fastdiff.samplers.euler import DIFFUSERS, Split, ancestral_step, scaled_table
from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import Coefficients, MethodInfo, Row, StepTable, fraction, make_row


def dpm2(
    problem: Problem,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float | None = None,
    s_noise: float = 1.0,
    initial: str = "unit",
    middles: Sequence[float] | None = None,
) -> StepTable:
    """y~ = y + (q - r) d, y' = y + (r' - r) d~, with q = sqrt(r r'), d = (y - D)/r at (y, r) and d~ at (y~, q).

    Two rows a step; the anchor is y. A step to r' = 0 is Euler's, one row. initial is that of `euler`, and s_churn,
    s_tmin, s_tmax and s_noise are those of `churn.Churn`: the step starts from the raised level.
    middles     q of each step, for a caller whose network is called there (diffusers rounds it to float32)
    """
    churn = churn_from("dpm2", s_churn, s_tmin, s_tmax, s_noise)

    def rows() -> Iterator[Row]:
        for i, step in enumerate(churn.steps(problem)):
            middle = None if middles is None else middles[i]
            yield from _step(problem, step.start, step.end.ratio, step.raised, to=step.to, middle=middle)

    return scaled_table("dpm2", problem, rows(), initial=initial, churn=churn)


def dpm2_ancestral(
    problem: Problem,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    initial: str = "unit",
    levels: Sequence[tuple[float, float, float] | None] | None = None,
) -> StepTable:
    """`dpm2` from r to d, and then u s_noise z is added: (d, u) = `euler.ancestral_step`(r, r', eta), q = sqrt(r d).

    initial     that of `euler`
    levels      (q, d, u) of each step, or None where they are to be those above, for a caller who has them (diffusers
                rounds them to float32, which a step that crosses orders of magnitude shows)
    """
    eta = fraction("dpm2_ancestral", "eta", eta)
    s_noise = fraction("dpm2_ancestral", "s_noise", s_noise, high=10.0)
    rows = ancestral_rows(problem, partial(ancestral_step, eta=eta), s_noise, levels)
    return scaled_table("dpm2_ancestral", problem, rows, initial=initial)


def ancestral_rows(
    problem: Problem,
    split: Split,
    s_noise: float,
    levels: Sequence[tuple[float, float, float] | None] | None = None,
) -> Iterator[Row]:
    """The rows of `dpm2_ancestral` whose steps are split like that: two a step, or one down to 0."""
    for i, (start, end) in enumerate(pairwise(problem.points(scaled=True))):
        middle, down, up = (levels and levels[i]) or (None, *split(start.ratio, end.ratio))
        yield from _step(problem, start, down, _adding(up * s_noise), to=end, middle=middle)


def _adding(noise: float) -> Callable[[Coefficients], Coefficients]:
    return lambda new_x: {**new_x, "noise": noise}


def _step(
    problem: Problem,
    start: Point,
    down: float,
    finish: Callable[[Coefficients], Coefficients],
    *,
    to: Point,
    middle: float | None = None,
) -> Iterator[Row]:
    """The rows from `start` to the ratio `down`; `finish` takes the coefficients of that state to those of `to`."""
    r = start.ratio
    if down == 0.0:
        yield make_row(problem, start, finish({"D": 1.0}), to=to)
        return
    q, h = math.sqrt(r * down) if middle is None else middle, down - r
    inner = problem.at_ratio(q, scaled=True)
    yield make_row(problem, start, {"x": q / r, "D": 1.0 - q / r}, to=inner, anchor={"x": 1.0})
    yield make_row(problem, inner, finish({"anchor": 1.0, "x": h / q, "D": -h / q}), to=to)


PAPER = "Crowson 2022, k-diffusion; Lu et al. 2022, DPM-Solver"

DPM2 = MethodInfo(
    name="dpm2",
    paper=PAPER,
    order=2,
    stochastic=False,
    evaluations_per_step=2,
    history=0,
    options={**CHURN_OPTIONS, "initial": "unit"},
    diffusers=DIFFUSERS,
    rows=dpm2,
    grid={"spacing": "karras"},
)
DPM2_ANCESTRAL = MethodInfo(
    name="dpm2_ancestral",
    paper=PAPER,
    order=2,
    stochastic=True,
    evaluations_per_step=2,
    history=0,
    options={"eta": 1.0, "s_noise": 1.0, "initial": "unit"},
    diffusers=DIFFUSERS,
    rows=dpm2_ancestral,
    grid={"spacing": "karras"},
)
