"""DDPM: ancestral sampling. Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equations 6 and 7."""

import math
from collections.abc import Iterator
from itertools import pairwise

from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, make_row, make_table

VARIANCES = ("fixed_small", "fixed_large")


def ddpm(problem: Problem, *, variance: str = "fixed_small") -> StepTable:
    """x' = (a v'/v) x + (alpha' f/v) D + std z, a = alpha/alpha', v = sigma^2, v' = sigma'^2, f = v - a^2 v'.

    f is the variance that the forward process adds from x' to x. variance: "fixed_small" is the posterior's,
    std^2 = f v'/v; "fixed_large" is std^2 = f. The step that ends at sigma' = 0 adds no noise; diffusers adds it to
    "fixed_large" unless that step starts at timestep 0.
    """
    choice("ddpm", "variance", variance, VARIANCES)
    return make_table("ddpm", problem, _rows(problem, variance))


def _rows(problem: Problem, variance: str) -> Iterator[Row]:
    for start, end in pairwise(problem.points()):
        a, v, v1 = start.alpha / end.alpha, start.sigma**2, end.sigma**2
        f = max(v - a * a * v1, 0.0)
        std = math.sqrt(f * v1 / v) if variance == "fixed_small" or v1 == 0.0 else math.sqrt(f)
        new_x = {"x": a * v1 / v, "D": end.alpha * f / v, "noise": std}
        yield make_row(problem, start, new_x, to=end)


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
