"""Heun's second-order method in y = x / alpha.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", algorithm 1.
"""

from collections.abc import Iterator

import numpy as np

from fastdiff.samplers.euler import DIFFUSERS, scaled_data, scaled_table
from fastdiff.samplers.table import MethodInfo, Problem, StepTable, make_row
from fastdiff.schedules import Array


def heun(problem: Problem, *, initial: str = "unit") -> StepTable:
    """y~ = y + h d, y' = y + h/2 (d + d~), with h = r' - r, d = (y - D)/r at (y, r) and d~ at (y~, r').

    Two rows a step: the first gives y~ and keeps the anchor y + h/2 d, the second adds h/2 d~ to it. A step to r' = 0
    is Euler's, one row. initial is that of `euler`.
    """
    grid = problem.grid
    looks_ahead = np.where(grid.sigmas[1:] > 0.0, 2, 1)
    # Each step calls the network at its start and, unless it ends at the data, at its end.
    points = [i + k for i in range(grid.steps) for k in range(looks_ahead[i])]
    return scaled_table("heun", problem, _rows(problem), initial=initial, timesteps=grid.timesteps[points])


def _rows(problem: Problem) -> Iterator[Array]:
    grid, clip = problem.grid, problem.clip
    ratios = grid.noise_ratios
    for i in range(grid.steps):
        r, r1, scale = ratios[i], ratios[i + 1], grid.alphas[i + 1]
        h = r1 - r
        data = scaled_data(problem, i)
        if r1 == 0.0:
            yield make_row(data, {"D": 1.0}, clip=clip, input_scale=scale)
            return
        predicted, halfway = {"x": r1 / r, "D": -h / r}, {"x": 1.0 + h / (2.0 * r), "D": -h / (2.0 * r)}
        yield make_row(data, predicted, clip=clip, anchor=halfway, input_scale=scale)
        corrected = {"anchor": 1.0, "x": h / (2.0 * r1), "D": -h / (2.0 * r1)}
        yield make_row(scaled_data(problem, i + 1), corrected, clip=clip, input_scale=scale)


INFO = MethodInfo(
    name="heun",
    paper="Karras et al. 2022, Elucidating the Design Space of Diffusion-Based Generative Models",
    order=2,
    stochastic=False,
    evaluations_per_step=2,
    history=0,
    options={"initial": "unit"},
    diffusers=DIFFUSERS,
    rows=heun,
    # Averaging the slopes of a long step in y fails where r falls by orders of magnitude, as even timesteps make it do
    # at the noisy end of the cosine schedule.
    grid={"spacing": "karras"},
)
