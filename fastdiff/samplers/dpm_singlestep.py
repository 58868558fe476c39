"""DPM-Solver and DPM-Solver++ as single-step methods of order 1 to 3.

Lu et al. 2022, "DPM-Solver", algorithms 1 and 2 and section 3.4; Lu et al. 2022, "DPM-Solver++", algorithm 1.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise, zip_longest
from typing import Any

from fastdiff.errors import InputError
from fastdiff.samplers.euler import ancestral_step
from fastdiff.samplers.exponential import SOLVERS, Data, Form, Noise
from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.singlestep import Aim, Block, block_between, block_of, block_rows
from fastdiff.samplers.table import MethodInfo, StepTable, choice, flag, fraction, make_table, whole

POINTS = ("between", "grid")
DEFAULT_NODES: dict[int, tuple[float, ...]] = {1: (), 2: (0.5,), 3: (1.0 / 3.0, 2.0 / 3.0)}


def dpm_solver_singlestep(problem: Problem, **options: Any) -> StepTable:
    """u = (alpha_s/alpha) x - sigma_s (e^(r1 h) - 1) epsilon,
    x' = (alpha'/alpha) x - sigma' (e^h - 1) epsilon - sigma' (e^h - 1)/(2 r1) (epsilon_u - epsilon).

    h is the step in lambda = log(alpha/sigma), s = lambda + r1 h, epsilon_u the prediction for u at s. This is order 2;
    order 3 has a second inner point at r2. A step to sigma' = 0, or from no signal, is of order 1.
    order               1 to 3; an order n takes n network calls a step
    r1, r2              None: 1/2 for order 2, 1/3 and 2/3 for order 3
    solver              "midpoint": the above; of order 3 that of algorithm 2. "heun": the polynomial through all the
                        predictions, integrated exactly. Either is of order 3 only if r2 = 2/3.
    points              "between": inner points lie between those of the grid. "grid": they are the grid's own, `order`
                        of its steps make one block, and a grid step is a network call (diffusers)
    lower_order_final   whether the last step is of order 1; with "grid" whether the last blocks are lowered so that the
                        last is (diffusers), which also happens where the grid's steps are no multiple of the order
    evaluations         the network calls in all: evaluations // 3 + 1 steps of order 3, but for the last, which take
                        what is left (DPM-Solver-fast; with spacing="logsnr" k-diffusion's dpm_fast); needs order=3
    eta, s_noise        each step goes down to `euler.ancestral_step`, but not below the last point, and adds noise
    """
    return _singlestep("dpm_solver_singlestep", Noise, problem, **options)


def dpmpp_singlestep(problem: Problem, **options: Any) -> StepTable:
    """u = (sigma_s/sigma) x + alpha_s (1 - e^(-r1 h)) D,
    x' = (sigma'/sigma) x + alpha' (1 - e^-h) (D + (D_u - D)/(2 r1)).

    `dpm_solver_singlestep` for the data prediction: D_u is that for u at lambda + r1 h. The options are the same.
    """
    return _singlestep("dpmpp_singlestep", Data, problem, **options)


def _singlestep(
    method: str,
    form: Form,
    problem: Problem,
    *,
    order: int = 2,
    r1: float | None = None,
    r2: float | None = None,
    solver: str = "midpoint",
    points: str = "between",
    lower_order_final: bool = False,
    evaluations: int | None = None,
    eta: float = 0.0,
    s_noise: float = 1.0,
) -> StepTable:
    order = whole(method, "order", order, 1, 3)
    choice(method, "solver", solver, SOLVERS)
    choice(method, "points", points, POINTS)
    flag(method, "lower_order_final", lower_order_final)
    nodes = inner_nodes(method, order, points, r1=r1, r2=r2)
    grid = problem.points()
    split = partial(ancestral_step, eta=fraction(method, "eta", eta))
    aim = Aim(split, fraction(method, "s_noise", s_noise, high=10.0), floor=grid[-1].ratio)
    orders = [order] * problem.grid.steps
    if evaluations is not None:
        orders = fast_orders(method, evaluations, order, points, problem.grid.steps)
    blocks: Iterator[Block]
    if points == "grid":
        blocks = grid_blocks(grid, order, aim, solver, lower_order_final)
    else:
        if lower_order_final:
            orders[-1] = 1
        blocks = between_blocks(problem, orders, aim, solver, nodes)
    return make_table(method, problem, (row for block in blocks for row in block_rows(problem, block, form)))


def inner_nodes(method: str, order: int, points: str, **given: Any) -> dict[int, tuple[float, ...]]:
    """Where the inner points of a block lie, in units of its length in lambda, for each order.

    given   the first and the second for `order`, under the names of the method's options; None: the default
    """
    names, got = ", ".join(given), " and ".join(map(repr, given.values()))
    numbers = [None if r is None else fraction(method, name, r) for name, r in given.items()]
    if any(r is not None for r in numbers[0 if points == "grid" else order - 1 :]):
        raise InputError(
            f"{method}: {names}: order {order} with points={points!r} has no use for them; leave them out, got {got}"
        )
    defaults = DEFAULT_NODES[order]
    nodes = tuple(default if r is None else r for r, default in zip_longest(numbers[: len(defaults)], defaults))
    if not all(lower < upper for lower, upper in pairwise((0.0, *nodes, 1.0))):
        raise InputError(f"{method}: {names}: expected rising numbers between 0 and 1, got {got}")
    return {**DEFAULT_NODES, order: nodes}


def between_blocks(
    problem: Problem, orders: Sequence[int], aim: Aim, solver: str, nodes: dict[int, tuple[float, ...]]
) -> Iterator[Block]:
    """One block for each step of the grid; of order 1 where lambda is infinite at an end, or the same at both."""
    for order, (start, end) in zip(orders, pairwise(problem.points()), strict=True):
        inside = start.ratio < math.inf and end.ratio not in (0.0, start.ratio)
        yield block_between(problem, start, end, aim, nodes[order if inside else 1], solver)


def grid_blocks(points: Sequence[Point], order: int, aim: Aim, solver: str, lowered: bool) -> Iterator[Block]:
    """Blocks of `order` steps of the grid each, lower ones at the end."""
    # No point can be placed relative to a start without signal: its step is a block of its own.
    first = int(points[0].ratio == math.inf)
    sizes = [1] * first + _sizes(len(points) - 1 - first, order, lowered, to_data=points[-1].ratio == 0.0)
    position = 0
    for size in sizes:
        yield block_of(points[position : position + size + 1], aim, solver)
        position += size


def _sizes(steps: int, order: int, lowered: bool, to_data: bool) -> list[int]:
    """How many grid steps each block takes; the last block takes one where it must be of order 1 (diffusers)."""
    if steps % order == 0 and not lowered and not to_data:
        return [order] * (steps // order)
    left = (steps - 1) % order + 1
    tails = {0: [], 1: [1], 2: [1, 1] if order == 2 or to_data else [2], 3: [2, 1]}
    return [order] * ((steps - 1) // order) + tails[left if steps else 0]


def fast_orders(method: str, evaluations: Any, order: int, points: str, steps: int) -> list[int]:
    """Order 3 as long as the network calls last, then 2 and 1. Lu et al. 2022, section 3.4."""
    count = whole(method, "evaluations", evaluations, 1, 3 * steps)
    if order != 3 or points != "between" or steps != count // 3 + 1:
        raise InputError(
            f"{method}: evaluations: {count} calls need order=3, points='between' and steps={count // 3 + 1}, "
            f"got order={order}, points={points!r} and steps={steps}"
        )
    return [3] * (steps - 2) + [2, 1] if count % 3 == 0 else [3] * (steps - 1) + [count % 3]


DIFFUSERS = {"spacing": "linspace", "endpoint": False, "points": "grid"}
OPTIONS = {
    "order": 2,
    "r1": None,
    "r2": None,
    "solver": "midpoint",
    "points": "between",
    "lower_order_final": False,
    "evaluations": None,
    "eta": 0.0,
    "s_noise": 1.0,
}

DPM_SOLVER_SINGLESTEP = MethodInfo(
    name="dpm_solver_singlestep",
    paper="Lu et al. 2022, DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps",
    order=2,
    stochastic=False,
    evaluations_per_step=2,
    history=0,
    options=OPTIONS,
    # Their class refuses to end at the data with epsilon.
    diffusers={**DIFFUSERS, "final_sigma": "schedule"},
    rows=dpm_solver_singlestep,
)
DPMPP_SINGLESTEP = MethodInfo(
    name="dpmpp_singlestep",
    paper="Lu et al. 2022, DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
    order=2,
    stochastic=False,
    evaluations_per_step=2,
    history=0,
    options=OPTIONS,
    diffusers=DIFFUSERS,
    rows=dpmpp_singlestep,
)
