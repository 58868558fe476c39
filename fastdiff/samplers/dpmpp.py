"""DPM-Solver++ (2M) and its SDE form.

Lu et al. 2022, "DPM-Solver++", algorithm 2 and section 5; the SDE form with eta is that of k-diffusion (Katherine
Crowson).
"""

import math
from collections.abc import Iterator
from itertools import pairwise

from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, fraction, make_row, make_table

SOLVERS = ("midpoint", "heun")


def dpmpp_2m(problem: Problem, *, solver: str = "midpoint", lower_order_final: bool | None = None) -> StepTable:
    """x' = (sigma'/sigma) x + alpha' (1 - e^-h) D + c (h/h0) (D - D0), h and h0 this and the last step in lambda.

    lambda = log(alpha/sigma); D0 is the data prediction of the step before. c = alpha' (1 - e^-h)/2 for "midpoint",
    alpha' (1 - (1 - e^-h)/h) for "heun".
    The first step has no D0 and is of order 1; so is a step to sigma' = 0, where h is infinite.
    lower_order_final   whether the last step is of order 1 in any case; None: where there are fewer than 15 steps.
    """
    return make_table("dpmpp_2m", problem, _rows("dpmpp_2m", problem, 0.0, 1.0, solver, lower_order_final))


def dpmpp_2m_sde(
    problem: Problem,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver: str = "midpoint",
    lower_order_final: bool | None = None,
) -> StepTable:
    """x' = (sigma'/sigma) e^(-eta h) x + alpha' (1 - e^-k) D + c (h/h0) (D - D0) + sigma' sqrt(1 - e^(-2 eta h)) z.

    k = (1 + eta) h; c is that of `dpmpp_2m` with k in place of h. eta = 0 is `dpmpp_2m`. The step to sigma' = 0 adds no
    noise.
    """
    eta = fraction("dpmpp_2m_sde", "eta", eta)
    s_noise = fraction("dpmpp_2m_sde", "s_noise", s_noise, high=10.0)
    return make_table("dpmpp_2m_sde", problem, _rows("dpmpp_2m_sde", problem, eta, s_noise, solver, lower_order_final))


def _rows(
    method: str, problem: Problem, eta: float, s_noise: float, solver: str, lower_order_final: bool | None
) -> Iterator[Row]:
    choice(method, "solver", solver, SOLVERS)
    points, steps = problem.points(), problem.grid.steps
    lower_last = steps < 15 if lower_order_final is None else lower_order_final
    # e^-h of every step, and h itself: infinite where a step starts without signal or ends at the data.
    decays = [end.ratio / start.ratio for start, end in pairwise(points)]
    lengths = [math.inf if decay == 0.0 else -math.log(decay) for decay in decays]
    second = [i > 0 and decays[i] > 0.0 and not (lower_last and i == steps - 1) for i in range(steps)]
    for i, (start, end) in enumerate(pairwise(points)):
        noise_kept = decays[i] ** eta
        total = 1.0 - decays[i] ** (1.0 + eta)
        new_x = {
            "x": end.sigma / start.sigma * noise_kept,
            "D": end.alpha * total,
            "noise": end.sigma * math.sqrt(max(1.0 - noise_kept**2, 0.0)) * s_noise,
        }
        if second[i]:
            k = (1.0 + eta) * lengths[i]
            c = 0.5 * total if solver == "midpoint" or k == 0.0 else 1.0 - total / k
            extrapolation = end.alpha * c * lengths[i] / lengths[i - 1]
            new_x["D"] += extrapolation
            new_x["hist1"] = -extrapolation
        keep = {"D": 1.0} if i + 1 < steps and second[i + 1] else None
        yield make_row(problem, start, new_x, to=end, history=keep)


DIFFUSERS = {"spacing": "linspace", "endpoint": False}

DPMPP_2M = MethodInfo(
    name="dpmpp_2m",
    paper="Lu et al. 2022, DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
    order=2,
    stochastic=False,
    evaluations_per_step=1,
    history=1,
    options={"solver": "midpoint", "lower_order_final": None},
    diffusers=DIFFUSERS,
    rows=dpmpp_2m,
)
DPMPP_2M_SDE = MethodInfo(
    name="dpmpp_2m_sde",
    paper="Lu et al. 2022, DPM-Solver++; Crowson 2022, k-diffusion",
    order=2,
    stochastic=True,
    evaluations_per_step=1,
    history=1,
    options={"eta": 1.0, "s_noise": 1.0, "solver": "midpoint", "lower_order_final": None},
    diffusers=DIFFUSERS,
    rows=dpmpp_2m_sde,
)
