"""DDIM. Song et al. 2021, "Denoising Diffusion Implicit Models", equations 12 and 16."""

import math
from collections.abc import Iterator

from fastdiff import parameterization
from fastdiff.samplers.table import MethodInfo, Problem, StepTable, choice, fraction, make_row, make_table
from fastdiff.schedules import Array

PREVIOUS = ("grid", "stride")


def ddim(
    problem: Problem, *, eta: float = 0.0, clipped_epsilon: bool = True, previous_timestep: str = "grid"
) -> StepTable:
    """x' = alpha' D + sqrt(sigma'^2 - s^2) epsilon + s z, s^2 = eta^2 (sigma'^2/sigma^2) (sigma^2 - a^2 sigma'^2).

    a = alpha/alpha'; eta = 0 is deterministic, eta = 1 is DDPM.
    clipped_epsilon     where D is clipped, whether epsilon is the one that leads from x to the clipped D (guided
                        diffusion) or the network's own (diffusers).
    previous_timestep   "grid": a step ends where the next begins. "stride": it ends at t - T // steps, as in
                        diffusers, which misses the next point with any spacing but "leading".
    """
    eta = fraction("ddim", "eta", eta)
    choice("ddim", "previous_timestep", previous_timestep, PREVIOUS)
    return make_table("ddim", problem, _rows(problem, eta, clipped_epsilon, previous_timestep == "stride"))


def _rows(problem: Problem, eta: float, clipped_epsilon: bool, stride: bool) -> Iterator[Array]:
    grid = problem.grid
    for i in range(grid.steps):
        alpha, sigma = grid.alphas[i], grid.sigmas[i]
        alpha1, sigma1 = _stride_end(problem, i) if stride else (grid.alphas[i + 1], grid.sigmas[i + 1])
        forward = max(sigma**2 - (alpha / alpha1 * sigma1) ** 2, 0.0)
        std = eta * sigma1 / sigma * math.sqrt(forward)
        direction = math.sqrt(max(sigma1**2 - std**2, 0.0))
        if problem.clip is not None and clipped_epsilon:
            new_x = {"x": direction / sigma, "D": alpha1 - direction * alpha / sigma}
        else:
            epsilon = parameterization.noise(problem.prediction, alpha, sigma)
            new_x = {"x": direction * epsilon.x, "m": direction * epsilon.m, "D": alpha1}
        yield make_row(
            parameterization.data(problem.prediction, alpha, sigma), {**new_x, "noise": std}, clip=problem.clip
        )


def _stride_end(problem: Problem, i: int) -> tuple[float, float]:
    schedule, grid = problem.schedule, problem.grid
    t = grid.timesteps[i] - schedule.steps // grid.steps
    if t < 0:
        return grid.alphas[-1], grid.sigmas[-1]
    alpha, sigma = schedule.at(t)
    return float(alpha), float(sigma)


INFO = MethodInfo(
    name="ddim",
    paper="Song et al. 2021, Denoising Diffusion Implicit Models",
    order=1,
    stochastic=False,
    evaluations_per_step=1,
    history=0,
    options={"eta": 0.0, "clipped_epsilon": True, "previous_timestep": "grid"},
    diffusers={"spacing": "leading", "clip": 1.0, "clipped_epsilon": False, "previous_timestep": "stride"},
    rows=ddim,
)
