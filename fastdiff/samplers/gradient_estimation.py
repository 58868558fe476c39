"""Gradient estimation: the noise prediction of a step, corrected by that of the step before."""

from collections.abc import Iterator
from itertools import pairwise

from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, fraction, make_row, make_table
from fastdiff.samplers.terms import epsilon, multistep


def gradient_estimation(problem: Problem, *, gamma: float = 2.0) -> StepTable:
    """x' = (alpha'/alpha) x + (sigma' - alpha' sigma/alpha) e, e = gamma epsilon + (1 - gamma) epsilon_1.

    epsilon_1 is the noise prediction of the step before; the first step and a step to sigma' = 0 take epsilon alone.
    Denoising is read as gradient descent on the distance from the data, and e as a better estimate of its gradient.

    gamma   from 0 to 10; default 2. 1 is DDIM, 3/2 the second-order Adams-Bashforth step for equal steps in
            sigma/alpha; every other gamma is of order 1.

    Source: Permenter and Yuan 2024, "Interpreting and Improving Diffusion Models from an Optimization Perspective",
    algorithm 2.
    """
    gamma = fraction("gradient_estimation", "gamma", gamma, high=10.0)
    return make_table("gradient_estimation", problem, _rows(problem, gamma))


def _rows(problem: Problem, gamma: float) -> Iterator[Row]:
    points, last = problem.points(), problem.grid.steps - 1
    for i, (start, end) in enumerate(pairwise(points)):
        weights = (1.0,) if i == 0 or end.sigma == 0.0 else (gamma, 1.0 - gamma)
        noise = epsilon(problem, start)
        read = i + 1 < last or (i + 1 == last and points[-1].sigma != 0.0)
        yield make_row(problem, start, multistep(start, end, noise, weights), to=end, history=noise if read else None)


INFO = MethodInfo(
    name="gradient_estimation",
    paper="Permenter and Yuan 2024, Interpreting and Improving Diffusion Models from an Optimization Perspective",
    order=1,
    stochastic=False,
    evaluations_per_step=1,
    history=1,
    options={"gamma": 2.0},
    rows=gradient_estimation,
)
