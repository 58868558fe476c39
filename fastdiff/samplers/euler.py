"""Euler and Euler ancestral in y = x / alpha = x_0 + r epsilon, r = sigma / alpha.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 2 without churn; the
ancestral step is that of k-diffusion (Katherine Crowson).
"""

import math
from collections.abc import Iterator

from fastdiff import parameterization
from fastdiff.errors import InputError
from fastdiff.parameterization import Linear
from fastdiff.samplers.table import MethodInfo, Problem, StepTable, choice, fraction, make_row, make_table
from fastdiff.schedules import Array

INITIAL_STATES = ("unit", "sigma")


def euler(problem: Problem, *, initial: str = "unit") -> StepTable:
    """y' = (r'/r) y + (1 - r'/r) D.

    initial     "unit": the network's first input has variance 1, as the schedule's x_T has; "sigma": y starts with
                standard deviation r (diffusers with linspace and trailing spacing).
    """
    return scaled_table("euler", problem, _ancestral_rows(problem, 0.0, 0.0), initial=initial)


def euler_ancestral(problem: Problem, *, eta: float = 1.0, s_noise: float = 1.0, initial: str = "unit") -> StepTable:
    """y' = (d/r) y + (1 - d/r) D + u s_noise z, u = min(r', eta r' sqrt(1 - r'^2/r^2)), d = sqrt(r'^2 - u^2).

    initial is that of `euler`.
    """
    eta = fraction("euler_ancestral", "eta", eta)
    s_noise = fraction("euler_ancestral", "s_noise", s_noise, high=10.0)
    return scaled_table("euler_ancestral", problem, _ancestral_rows(problem, eta, s_noise), initial=initial)


def _ancestral_rows(problem: Problem, eta: float, s_noise: float) -> Iterator[Array]:
    ratios = problem.grid.noise_ratios
    for i in range(problem.grid.steps):
        r, r1 = ratios[i], ratios[i + 1]
        up = min(r1, eta * r1 * math.sqrt(max(1.0 - (r1 / r) ** 2, 0.0)))
        shrink = math.sqrt(max(r1**2 - up**2, 0.0)) / r
        yield make_row(
            scaled_data(problem, i),
            {"x": shrink, "D": 1.0 - shrink, "noise": up * s_noise},
            clip=problem.clip,
            input_scale=problem.grid.alphas[i + 1],
        )


def scaled_data(problem: Problem, i: int) -> Linear:
    """D at point i from the state y = x / alpha."""
    alpha, sigma = problem.grid.alphas[i], problem.grid.sigmas[i]
    return parameterization.data(problem.prediction, alpha, sigma, state_scale=alpha)


def scaled_table(
    method: str, problem: Problem, rows: Iterator[Array], *, initial: str, timesteps: Array | None = None
) -> StepTable:
    """The table of a method whose state is y = x / alpha."""
    choice(method, "initial", initial, INITIAL_STATES)
    if problem.schedule.kind != "vp":
        raise InputError(f"{method}: needs a VP schedule, got {problem.schedule.name!r}; use flow_euler or dpmpp_2m")
    alpha = float(problem.grid.alphas[0])
    scale = 1.0 / alpha if initial == "unit" else float(problem.grid.noise_ratios[0])
    return make_table(method, problem, rows, timesteps=timesteps, init_scale=scale, first_input_scale=alpha)


DIFFUSERS = {"spacing": "linspace", "integer": False, "interpolation": "linear", "initial": "sigma"}

EULER = MethodInfo(
    name="euler",
    paper="Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models",
    order=1,
    stochastic=False,
    evaluations_per_step=1,
    history=0,
    options={"initial": "unit"},
    diffusers=DIFFUSERS,
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
