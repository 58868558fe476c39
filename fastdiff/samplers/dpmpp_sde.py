"""Stochastic single-step DPM-Solver++: ancestral steps, and the reverse SDE with an inner point.

Both are those of k-diffusion (Katherine Crowson), after Lu et al. 2022, "DPM-Solver++", section 5, and "DPM-Solver",
algorithm 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain

from fastdiff.errors import InputError
from fastdiff.samplers.dpm_singlestep import POINTS, between_blocks, grid_blocks, inner_nodes
from fastdiff.samplers.euler import ancestral_step
from fastdiff.samplers.exponential import SOLVERS, Data, log_ratio
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.singlestep import Aim, Block, block_rows
from fastdiff.samplers.table import MethodInfo, StepTable, choice, flag, fraction, make_table, whole

NOISES = ("brownian", "independent")
CURVATURES = ("exact", "offset")


def dpmpp_2s_ancestral(problem: Problem, *, eta: float = 1.0, s_noise: float = 1.0) -> StepTable:
    """`dpmpp_singlestep` of order 2 from r down to d, and then x' + alpha' u s_noise z; (d, u) = `ancestral_step`.

    r = sigma/alpha; d lies below r' by as much as the noise makes up for. The inner point is half of the way from r to
    d in lambda. A step to sigma' = 0, or from no signal, is Euler's.
    eta       from 0, no noise, to 1; default 1
    s_noise   the noise is multiplied by it
    """
    method = "dpmpp_2s_ancestral"
    split = partial(ancestral_step, eta=fraction(method, "eta", eta))
    aim = Aim(split, fraction(method, "s_noise", s_noise, high=10.0))
    blocks = between_blocks(problem, [2] * problem.grid.steps, aim, "midpoint", inner_nodes(method, 2, "between"))
    return make_table(method, problem, (row for block in blocks for row in block_rows(problem, block, Data)))


def dpmpp_sde(
    problem: Problem,
    *,
    r: float | None = None,
    eta: float = 1.0,
    s_noise: float = 1.0,
    noise: str = "brownian",
    order: int = 2,
    points: str = "between",
    solver: str = "midpoint",
    curvature: str = "exact",
    lower_order_final: bool = False,
    middles: Sequence[float | None] | None = None,
) -> StepTable:
    """u = (alpha_s d_s/sigma) x + alpha_s (1 - d_s/rho) D + alpha_s u_s s_noise z_1,
    x' = (alpha' d/sigma) x + alpha' (1 - d/rho) (D + (D_u - D)/(2 r)) + alpha' u s_noise z_2.

    rho = sigma/alpha; (d_s, u_s) = `ancestral_step` from x to s, r of the way in lambda, and (d, u) to the end; D_u is
    the prediction for u at s. At eta = 1 these are exact steps of the reverse SDE for constant D. A step to sigma' = 0,
    or from no signal, is of order 1.
    r                   where s lies, between 0 and 1; None: 1/2, and 1/3 for order 3
    eta                 from 0, no noise, to 1; default 1
    s_noise             the noise is multiplied by it
    noise               "brownian": z_1 and z_2 are the increments, from rho to rho_s and to rho', of one Brownian path
                        over rho, each divided by its standard deviation (k-diffusion):
                        z_2 = sqrt(c) z_1 + sqrt(1 - c) z', c = (rho - rho_s)/(rho - rho'). "independent": z_2 is taken
                        as it is given, for a caller who draws from a path; it is less exact if that is none.
    order, points, solver, lower_order_final   those of `dpmpp_singlestep`, whose r1 is r
    curvature           of order 3 with solver="heun": "exact", or "offset", diffusers' with a wrong sign: an error as
                        large as the curvature itself
    middles             rho at s of each step, or None where it is to lie as said above, for a caller whose network is
                        called there (diffusers rounds it to float32); only with order=2 and points="between"
    """
    method = "dpmpp_sde"
    order = whole(method, "order", order, 1, 3)
    if middles is not None and (order != 2 or points != "between" or len(middles) != problem.grid.steps):
        raise InputError(
            f"{method}: middles: expected one for each of {problem.grid.steps} steps, with order=2 and "
            f"points='between', got {len(middles)} with order={order} and points={points!r}"
        )
    choice(method, "noise", noise, NOISES)
    choice(method, "solver", solver, SOLVERS)
    choice(method, "points", points, POINTS)
    choice(method, "curvature", curvature, CURVATURES)
    flag(method, "lower_order_final", lower_order_final)
    split = partial(ancestral_step, eta=fraction(method, "eta", eta))
    aim = Aim(split, fraction(method, "s_noise", s_noise, high=10.0), sde=True)
    nodes = inner_nodes(method, order, points, r=r)
    blocks: Iterator[Block]
    if points == "grid":
        blocks = grid_blocks(problem.points(), order, aim, solver, lower_order_final)
    else:
        orders = [order] * (problem.grid.steps - lower_order_final) + [1] * lower_order_final
        blocks = between_blocks(problem, orders, aim, solver, nodes)
        if middles is not None:
            blocks = map(partial(_through, problem, aim, nodes[2][0]), blocks, middles)
    rows = (block_rows(problem, block, Data, brownian=noise == "brownian", curvature=curvature) for block in blocks)
    return make_table(method, problem, chain.from_iterable(rows))


def _through(problem: Problem, aim: Aim, r: float, block: Block, middle: float | None) -> Block:
    """The same block with its inner point, if it has one, at that rho, with the weights of one at r."""
    if middle is None or len(block.points) == 1:
        return block
    start, inner = block.points[0], problem.at_ratio(middle)
    last = replace(block.targets[-1], length=log_ratio(start.ratio, middle) / r)
    return Block((start, inner), (aim.inner(start, inner), last), block.solvers)


DPMPP_2S_ANCESTRAL = MethodInfo(
    name="dpmpp_2s_ancestral",
    paper="Crowson 2022, k-diffusion; Lu et al. 2022, DPM-Solver++",
    order=2,
    stochastic=True,
    evaluations_per_step=2,
    history=0,
    options={"eta": 1.0, "s_noise": 1.0},
    rows=dpmpp_2s_ancestral,
)
DPMPP_SDE = MethodInfo(
    name="dpmpp_sde",
    paper="Crowson 2022, k-diffusion; Lu et al. 2022, DPM-Solver++",
    order=2,
    stochastic=True,
    evaluations_per_step=2,
    history=0,
    options={
        "r": None,
        "eta": 1.0,
        "s_noise": 1.0,
        "noise": "brownian",
        "order": 2,
        "points": "between",
        "solver": "midpoint",
        "curvature": "exact",
        "lower_order_final": False,
    },
    # Those of DPMSolverSDEScheduler, whose state is x / alpha.
    diffusers={"spacing": "linspace", "integer": False, "interpolation": "linear", "noise": "independent"},
    rows=dpmpp_sde,
)
