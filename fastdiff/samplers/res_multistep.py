"""The second-order exponential multistep method of refined exponential solvers, with ancestral noise."""

from collections.abc import Iterator
from itertools import pairwise

from fastdiff.samplers.euler import ancestral_step
from fastdiff.samplers.exponential import Data, corrections, log_ratio
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, fraction, make_row, make_table


def res_multistep(problem: Problem, *, eta: float = 0.0, s_noise: float = 1.0) -> StepTable:
    """x' = (alpha'/alpha) e^-h x + alpha' h (phi_1 D + phi_2 (D_1 - D)/c) + alpha' u s_noise z, phi_n = phi_n(-h).

    The step goes down to d, h = log(r/d), r = sigma/alpha, and (d, u) = `euler.ancestral_step`(r, r', eta); D_1 is the
    data prediction of the step before, c = -h_1/h with the h_1 of that step. Without noise it is `dpmpp_2m` with
    solver="heun" and full order to the end. The first step and one to d = 0 are of order 1.

    eta       from 0, no noise; default 0. From 1 up a step may go down to 0
    s_noise   the noise is multiplied by it

    Source: Zhang et al. 2023, "Improved Order Analysis and Design of Exponential Integrator for Diffusion Models
    Sampling", the multistep scheme; the noise is ComfyUI's (res_multistep_ancestral).
    """
    eta = fraction("res_multistep", "eta", eta, high=100.0)
    s_noise = fraction("res_multistep", "s_noise", s_noise, high=100.0)
    return make_table("res_multistep", problem, _rows(problem, eta, s_noise))


def _rows(problem: Problem, eta: float, s_noise: float) -> Iterator[Row]:
    points, earlier, last = problem.points(), 0.0, problem.grid.steps - 1
    for i, (start, end) in enumerate(pairwise(points)):
        down, up = ancestral_step(start.ratio, end.ratio, eta)
        step, length = Data.propagate(start, end.alpha, down), log_ratio(start.ratio, down)
        weight = 0.0
        if down > 0.0 and length > 0.0 and earlier > 0.0:
            (weight,) = (step.scale * w for w in corrections([-earlier / length], step.z, "heun"))
        new_x = {"x": step.x, "D": step.q - weight, "hist1": weight, "noise": end.alpha * up * s_noise}
        read = i + 1 < last or (i + 1 == last and points[-1].sigma != 0.0)
        yield make_row(problem, start, new_x, to=end, history={"D": 1.0} if read else None)
        earlier = length


INFO = MethodInfo(
    name="res_multistep",
    paper="Zhang et al. 2023, Improved Order Analysis and Design of Exponential Integrator for Diffusion Models",
    order=2,
    stochastic=False,
    evaluations_per_step=1,
    history=1,
    options={"eta": 0.0, "s_noise": 1.0},
    rows=res_multistep,
)
