"""The probability-flow ODE and the reverse SDE of a score model, in the schedule's own time.

Song et al. 2021, "Score-Based Generative Modeling through Stochastic Differential Equations". The forward process is
dx = f x ds + g dw (`Schedule.drift_diffusion`), and score = -(x - alpha D) / sigma^2 = -epsilon / sigma.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise

from fastdiff.errors import InputError
from fastdiff.parameterization import Linear
from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import Coefficients, MethodInfo, Row, StepTable, choice, make_row, make_table, whole
from fastdiff.schedules.schedule import positive


def pf_ode(problem: Problem, *, order: int = 2) -> StepTable:
    """dx/ds = v = f x - (g^2/2) score = (d alpha/ds) D + (d sigma/ds) epsilon, s the schedule's time; h = s' - s.

    order   1, Euler: x' = x + h v. 2, Heun: x~ = x + h v, x' = x + h/2 (v + v~) with v~ at (x~, s'), two rows a step of
            which the first keeps the anchor x + h/2 v.

    The step to sigma' = 0 is x' = D, as the released code removes the last noise. Source: Song et al. 2021, equation
    13.
    """
    order = whole("pf_ode", "order", order, 1, 2)
    return make_table("pf_ode", problem, _ode_rows(problem, order))


def _ode_rows(problem: Problem, order: int) -> Iterator[Row]:
    for start, end in pairwise(problem.points()):
        if end.sigma == 0.0:
            yield make_row(problem, start, {"D": 1.0}, to=end)
            return
        h = _time(end) - _time(start)
        x, data = _velocity(start)
        euler = {"x": 1.0 + h * x, "D": h * data}
        if order == 1:
            yield make_row(problem, start, euler, to=end)
            continue
        halfway = {"x": 1.0 + 0.5 * h * x, "D": 0.5 * h * data}
        yield make_row(problem, start, euler, to=end, anchor=halfway)
        x, data = _velocity(end)
        yield make_row(problem, end, {"anchor": 1.0, "x": 0.5 * h * x, "D": 0.5 * h * data}, to=end)


def _timestep(point: Point) -> float:
    """The timestep of the point's level, which what the network is told may be a rounding of."""
    t = float(point.schedule.timestep_of(point.ratio))
    # The rates of a discrete schedule jump at its timesteps: a rounding must not choose the side.
    return t if point.schedule.continuous else round(t, 9)


def _time(point: Point) -> float:
    return float(point.schedule.time(_timestep(point)))


def _rates(point: Point) -> tuple[float, float]:
    f, g2 = point.schedule.drift_diffusion(_timestep(point))
    return float(f), float(g2)


def _velocity(point: Point) -> tuple[float, float]:
    """(a, b) of v = a x + b D: a = (d sigma/ds) / sigma, b = d alpha/ds - alpha a."""
    alpha, sigma = point.alpha, point.sigma
    if alpha == 0.0:
        return _velocity_without_signal(point)
    f, g2 = _rates(point)
    growth = 0.5 * g2 / sigma**2
    return f + growth, -alpha * growth


def _velocity_without_signal(point: Point) -> tuple[float, float]:
    """The limit: f and g are infinite, but alpha f just before is d alpha/ds. sigma = 1 stands still where the variance
    is kept, and falls as alpha rises on a flow schedule."""
    schedule = point.schedule
    before = _timestep(point) * (1.0 - 1e-7)
    slope = float(schedule.at(before)[0] * schedule.drift_diffusion(before)[0])
    return (-slope if schedule.kind == "flow" else 0.0), slope


def reverse_sde(
    problem: Problem, *, predictor: str = "reverse_diffusion", corrector_steps: int = 0, snr: float = 0.16
) -> StepTable:
    """At each point Langevin correctors, then a predictor to the next: Song et al. 2021, algorithm 1.

    With a = alpha/alpha', G^2 = sigma^2 - a^2 sigma'^2 and dt = s - s' > 0 the predictor is
    "reverse_diffusion"     x' = (2 - a) x + G^2 score + G z (equation 46)
    "euler_maruyama"        x' = x - (f x - g^2 score) dt + g sqrt(dt) z
    "ancestral"             x' = (x + G^2 score) / a + k z, k = G on VP schedules (equation 4) and G sigma'/sigma
                            elsewhere (equation 47)
    "none"                  x' = x: the correctors alone, which is annealed Langevin dynamics

    corrector_steps     x' = x + e score + sqrt(2 e) z, e = 2 c (snr |z| / |score|)^2, c = a^2; so often a point
                        (algorithms 4 and 5)
    snr                 of the correctors

    The step to sigma' = 0 is x' = D, which is the released code's last step without its noise, for VE schedules and the
    ancestral predictor exactly. Norms are those of each sample; the released code and diffusers' ScoreSdeVeScheduler
    average them over the batch, so that there a sample depends on the others.
    """
    choice("reverse_sde", "predictor", predictor, tuple(_PREDICTORS))
    corrections = whole("reverse_sde", "corrector_steps", corrector_steps, 0, 100)
    snr = positive("reverse_sde: snr", snr)
    if predictor == "none" and corrections == 0:
        raise InputError("reverse_sde: corrector_steps: predictor='none' needs at least 1, got 0")
    if problem.grid.alphas[0] == 0.0 and predictor != "ancestral":
        raise InputError(
            f"reverse_sde: the schedule {problem.schedule.name!r} keeps no signal at its first timestep, which only "
            "predictor='ancestral' can start from; use it or a smaller sigma_max"
        )
    return make_table("reverse_sde", problem, _sde_rows(problem, predictor, corrections, snr))


def _sde_rows(problem: Problem, predictor: str, corrections: int, snr: float) -> Iterator[Row]:
    for start, end in pairwise(problem.points()):
        # Without a predictor the last corrected state is where the next level begins.
        moves = predictor != "none" or end.sigma == 0.0
        last = start if moves else end
        if start.alpha > 0.0:
            for left in reversed(range(corrections)):
                yield _corrector(problem, start, end, snr, to=start if left else last)
        if end.sigma == 0.0:
            yield make_row(problem, start, {"D": 1.0}, to=end)
        elif moves:
            yield make_row(problem, start, _PREDICTORS[predictor](start, end), to=end)


def _corrector(problem: Problem, start: Point, end: Point, snr: float, *, to: Point) -> Row:
    factor = (start.alpha / end.alpha) ** 2
    score = Linear(-start.noise.x / start.sigma, -start.noise.m / start.sigma)
    new_x = {"x": 1.0, "D": factor, "noise": math.sqrt(factor)}
    return make_row(problem, start, new_x, to=to, data=score, clip=False, snr=snr)


def _added(start: Point, end: Point) -> tuple[float, float]:
    """(a, G^2): the forward process multiplies x' by a and adds noise of variance G^2."""
    a = start.alpha / end.alpha
    return a, max(start.sigma**2 - (a * end.sigma) ** 2, 0.0)


def _with_score(x: float, score: float, noise: float, point: Point) -> Coefficients:
    """x, score and z by their coefficients, the score written in x and D."""
    score /= point.sigma**2
    return {"x": x - score, "D": score * point.alpha, "noise": noise}


def _reverse_diffusion(start: Point, end: Point) -> Coefficients:
    a, added = _added(start, end)
    return _with_score(2.0 - a, added, math.sqrt(added), start)


def _euler_maruyama(start: Point, end: Point) -> Coefficients:
    f, g2 = _rates(start)
    dt = _time(start) - _time(end)
    return _with_score(1.0 - f * dt, g2 * dt, math.sqrt(g2 * dt), start)


def _ancestral(start: Point, end: Point) -> Coefficients:
    a, added = _added(start, end)
    variance = added if start.schedule.kind == "vp" else added * (end.sigma / start.sigma) ** 2
    # (x + G^2 score) / a, written so that a may be 0.
    kept = a * (end.sigma / start.sigma) ** 2
    return {"x": kept, "D": end.alpha * added / start.sigma**2, "noise": math.sqrt(variance)}


_PREDICTORS: dict[str, Callable[[Point, Point], Coefficients]] = {
    "reverse_diffusion": _reverse_diffusion,
    "euler_maruyama": _euler_maruyama,
    "ancestral": _ancestral,
    "none": lambda start, end: {},
}

PF_ODE = MethodInfo(
    name="pf_ode",
    paper="Song et al. 2021, Score-Based Generative Modeling through Stochastic Differential Equations",
    order=2,
    stochastic=False,
    evaluations_per_step=2,
    history=0,
    options={"order": 2},
    grid={"spacing": "linspace"},
    rows=pf_ode,
)
REVERSE_SDE = MethodInfo(
    name="reverse_sde",
    paper="Song et al. 2021, Score-Based Generative Modeling through Stochastic Differential Equations",
    order=1,
    stochastic=True,
    evaluations_per_step=1,
    history=0,
    options={"predictor": "reverse_diffusion", "corrector_steps": 0, "snr": 0.16},
    grid={"spacing": "linspace"},
    diffusers={"corrector_steps": 1, "snr": 0.15},
    rows=reverse_sde,
)
