"""Heun++: Heun's method with a third slope from the point after, in y = x / alpha, with stochastic churn."""

from collections.abc import Iterator

from fastdiff.samplers.churn import CHURN_OPTIONS, Churn, churn_from
from fastdiff.samplers.euler import DIFFUSERS, scaled_table
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, make_row


def heunpp2(
    problem: Problem,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float | None = None,
    s_noise: float = 1.0,
    initial: str = "unit",
) -> StepTable:
    """y' = y + h (w_1 d_1 + w_2 d_2 + w_3 d_3), h = r' - r, w_2 = r'/(3 R), w_3 = r''/(3 R), w_1 = 1 - w_2 - w_3.

    r = sigma/alpha, R that of the first point, r'' of the point after the step. d_1 = (y - D)/r is the slope at (y, r),
    d_2 that at (y + h d_1, r'), d_3 that where a further Euler step leads, at r''. The last step but one has the first
    two with w_2 = r'/(2 R), the last one is Euler's. A late step is nearly Euler's: the order is 1.

    initial is that of `euler`, and s_churn, s_tmin, s_tmax and s_noise are those of `churn.Churn`.
    Source: "heunpp2" of Carzit's sd-webui-samplers-scheduler and of ComfyUI; Karras et al. 2022, algorithm 2.
    """
    chosen = churn_from("heunpp2", s_churn, s_tmin, s_tmax, s_noise)
    return scaled_table("heunpp2", problem, _rows(problem, chosen), initial=initial, churn=chosen)


def _rows(problem: Problem, chosen: Churn) -> Iterator[Row]:
    steps = [*chosen.steps(problem)]
    highest = problem.points(scaled=True)[0].ratio
    for i, step in enumerate(steps):
        start, end = step.start, step.end
        r, r1 = start.ratio, end.ratio
        h, after = r1 - r, steps[i + 1].end if i + 1 < len(steps) else None
        if after is None or r1 == 0.0:
            yield make_row(problem, start, step.raised({"x": r1 / r, "D": -h / r}), to=step.to)
            continue
        third = i + 2 < len(steps)
        w2 = r1 / ((3.0 if third else 2.0) * highest)
        w3 = after.ratio / (3.0 * highest) if third else 0.0
        w1 = 1.0 - w2 - w3
        yield make_row(
            problem,
            start,
            {"x": r1 / r, "D": -h / r},
            to=end,
            anchor={"x": 1.0 + h * w1 / r, "D": -h * w1 / r},
        )
        second = {"anchor": 1.0, "x": h * w2 / r1, "D": -h * w2 / r1}
        if not third:
            yield make_row(problem, end, step.raised(second), to=step.to)
            continue
        r2 = after.ratio
        yield make_row(problem, end, {"x": r2 / r1, "D": 1.0 - r2 / r1}, to=after, anchor=second)
        last = {"anchor": 1.0, "x": h * w3 / r2, "D": -h * w3 / r2}
        yield make_row(problem, after, step.raised(last), to=step.to)


INFO = MethodInfo(
    name="heunpp2",
    paper="Carzit 2024, Heun++ (sd-webui-samplers-scheduler); Karras et al. 2022",
    order=1,
    stochastic=False,
    evaluations_per_step=3,
    history=0,
    options={**CHURN_OPTIONS, "initial": "unit"},
    diffusers=DIFFUSERS,
    rows=heunpp2,
    grid={"spacing": "karras"},
)
