"""DDPM: ancestral sampling.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models", equations 6 and 7; learned variances: Nichol and Dhariwal
2021, "Improved Denoising Diffusion Probabilistic Models", equation 15.
"""

import math
from collections.abc import Iterator

from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, flag, make_row, make_table

VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
SMALLEST = 1e-20


def ddpm(problem: Problem, *, variance: str = "fixed_small", final_noise: bool = False) -> StepTable:
    """x' = (a v'/v) x + (alpha' f/v) D + std z, a = alpha/alpha', v = sigma^2, v' = sigma'^2, f = v - a^2 v'.

    f is the variance that the forward process adds from x' to x.
    variance    "fixed_small": the posterior's, std^2 = f v'/v. "fixed_large": std^2 = f. With w the network's variance
                channels: "learned_range": std^2 is f^c (f v'/v)^(1 - c), c = (1 + w)/2, w in [-1, 1], the smaller
                variance at least 1e-20; "learned": std^2 = e^w.
    final_noise whether a step that ends at sigma' = 0 adds noise like the others, as in diffusers, where only a step
                that starts at timestep 0 adds none; "fixed_small" is 0 there.
    diffusers' fixed_small_log is "fixed_small"; its fixed_large_log takes the root of a logarithm, which is no number;
    its "learned" takes w itself as the variance, so that a network for it has to be wrapped in a logarithm here.
    """
    choice("ddpm", "variance", variance, VARIANCES)
    flag("ddpm", "final_noise", final_noise)
    return make_table("ddpm", problem, _rows(problem, variance, final_noise))


def _rows(problem: Problem, variance: str, final_noise: bool) -> Iterator[Row]:
    for interval in problem.intervals():
        start, end, f = interval.start, interval.end, interval.added
        a, v, v1 = interval.shrink, start.sigma**2, end.sigma**2
        noisy = v1 > 0.0 or (final_noise and start.timestep > 0.0)
        std, slope = _noise(variance, f * v1 / v, f) if noisy else (0.0, 0.0)
        new_x = {"x": a * v1 / v, "D": end.alpha * f / v, "noise": std}
        yield make_row(problem, start, new_x, to=end, variance=slope)


def _noise(variance: str, small: float, large: float) -> tuple[float, float]:
    """(std, s): the noise is std e^(s w) z."""
    if variance == "learned":
        return 1.0, 0.5
    if variance == "learned_range":
        small, large = max(small, SMALLEST), max(large, SMALLEST)
        return (small * large) ** 0.25, math.log(large / small) / 4.0
    return math.sqrt(small if variance == "fixed_small" else large), 0.0


INFO = MethodInfo(
    name="ddpm",
    paper="Ho et al. 2020, Denoising Diffusion Probabilistic Models",
    order=1,
    stochastic=True,
    evaluations_per_step=1,
    history=0,
    options={"variance": "fixed_small", "final_noise": False},
    diffusers={"spacing": "leading", "clip": 1.0},
    rows=ddpm,
)
