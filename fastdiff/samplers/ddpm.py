"""DDPM: ancestral sampling. Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equations 6 and 7."""

import math
from collections.abc import Iterator

from fastdiff import parameterization
from fastdiff.samplers.table import MethodInfo, Problem, StepTable, choice, make_row, make_table
from fastdiff.schedules import Array

VARIANCES = ("fixed_small", "fixed_large")


def ddpm(problem: Problem, *, variance: str = "fixed_small") -> StepTable:
    """x' = (a v'/v) x + (alpha' f/v) D + std z, a = alpha/alpha', v = sigma^2, v' = sigma'^2, f = v - a^2 v'.

    f is the variance that the forward process adds from x' to x. variance: "fixed_small" is the posterior's,
    std^2 = f v'/v; "fixed_large" is std^2 = f. The step that ends at sigma' = 0 adds no noise; diffusers adds it to
    "fixed_large" unless that step starts at timestep 0.
    """
    choice("ddpm", "variance", variance, VARIANCES)
    return make_table("ddpm", problem, _rows(problem, variance))


def _rows(problem: Problem, variance: str) -> Iterator[Array]:
    grid = problem.grid
    for i in range(grid.steps):
        alpha, sigma, alpha1, sigma1 = grid.alphas[i], grid.sigmas[i], grid.alphas[i + 1], grid.sigmas[i + 1]
        a, v, v1 = alpha / alpha1, sigma**2, sigma1**2
        f = max(v - a * a * v1, 0.0)
        std = math.sqrt(f * v1 / v) if variance == "fixed_small" or v1 == 0.0 else math.sqrt(f)
        yield make_row(
            parameterization.data(problem.prediction, alpha, sigma),
            {"x": a * v1 / v, "D": alpha1 * f / v, "noise": std},
            clip=problem.clip,
        )


INFO = MethodInfo(
    name="ddpm",
    paper="Ho et al. 2020, Denoising Diffusion Probabilistic Models",
    order=1,
    stochastic=True,
    evaluations_per_step=1,
    history=0,
    options={"variance": "fixed_small"},
    diffusers={"spacing": "leading", "clip": 1.0},
    rows=ddpm,
)
