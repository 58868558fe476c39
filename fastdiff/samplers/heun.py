"""Heun's second-order method in y = x / alpha, with stochastic churn.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithms 1 and 2.
"""

from collections.abc import Iterator

from fastdiff.samplers.churn import CHURN_OPTIONS, Churn, ChurnedStep, churn_from
from fastdiff.samplers.euler import DIFFUSERS, scaled_table
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, make_row


def heun(
    problem: Problem,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float | None = None,
    s_noise: float = 1.0,
    initial: str = "unit",
) -> StepTable:
    """y~ = y + h d, y' = y + h/2 (d + d~), with h = r' - r, d = (y - D)/r at (y, r) and d~ at (y~, r').

    Two rows a step: the first gives y~ and keeps the anchor y + h/2 d, the second adds h/2 d~ to it. A step to r' = 0
    is Euler's, one row. initial is that of `euler`, and s_churn, s_tmin, s_tmax and s_noise are those of `churn.Churn`:
    the step starts from the raised level.
    """
    chosen = churn_from("heun", s_churn, s_tmin, s_tmax, s_noise)
    return scaled_table("heun", problem, _rows(problem, chosen), initial=initial, churn=chosen)


def _rows(problem: Problem, chosen: Churn) -> Iterator[Row]:
    for step in chosen.steps(problem):
        yield from heun_step(problem, step)


def heun_step(problem: Problem, step: ChurnedStep) -> Iterator[Row]:
    """The rows of one step: two, or one to r' = 0."""
    start, end = step.start, step.end
    r, r1 = start.ratio, end.ratio
    if r1 == 0.0:
        yield make_row(problem, start, {"D": 1.0}, to=end)
        return
    h = r1 - r
    predicted, halfway = {"x": r1 / r, "D": -h / r}, {"x": 1.0 + h / (2.0 * r), "D": -h / (2.0 * r)}
    yield make_row(problem, start, predicted, to=end, anchor=halfway)
    corrected = {"anchor": 1.0, "x": h / (2.0 * r1), "D": -h / (2.0 * r1)}
    yield make_row(problem, end, step.raised(corrected), to=step.to)


INFO = MethodInfo(
    name="heun",
    paper="Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models",
    order=2,
    stochastic=False,
    evaluations_per_step=2,
    history=0,
    options={**CHURN_OPTIONS, "initial": "unit"},
    diffusers=DIFFUSERS,
    rows=heun,
    # Averaging the slopes of a long step in y fails where r falls by orders of magnitude, as even timesteps make it do
    # at the noisy end of the cosine schedule.
    grid={"spacing": "karras"},
)
