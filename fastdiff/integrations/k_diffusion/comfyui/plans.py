"""The plans of ComfyUI's samplers for a run's levels: rows of `fastdiff.samplers`, as `k_diffusion.plans` has them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from fastdiff import samplers, schedules
from fastdiff.integrations.k_diffusion.loop import Plan
from fastdiff.integrations.k_diffusion.plans import split_in
from fastdiff.integrations.k_diffusion.sigmas import get_ancestral_step
from fastdiff.ops.row import PREDICTION
from fastdiff.samplers.adams import Orders, adams_rows
from fastdiff.samplers.dpm_singlestep import DEFAULT_NODES, between_blocks
from fastdiff.samplers.er_sde import er_sde as er_sde_rows
from fastdiff.samplers.euler import ancestral_rows
from fastdiff.samplers.exponential import Data
from fastdiff.samplers.grid import Grid
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.singlestep import Aim, block_rows
from fastdiff.samplers.table import Row, StepTable, make_row, make_table

Levels = tuple[float, ...]

_KEPT_PLANS = 64
# Where ComfyUI sums what others integrate.
ER_SDE_POINTS, DEIS_POINTS = 200, 10_000
# A level that rounding takes to 0, where a logarithm of it is taken.
SMALLEST = 1e-30
cached = lru_cache(maxsize=_KEPT_PLANS)


@lru_cache(maxsize=1)
def _variance_exploding() -> schedules.Schedule:
    return schedules.ve(2, sigma_min=1.0, sigma_max=2.0)


@lru_cache(maxsize=1)
def _straight() -> schedules.Schedule:
    return schedules.flow(1000)


def problem_of(levels: Levels, flow: bool = False) -> Problem:
    """States x_0 + sigma epsilon, of a flow (1 - sigma) x_0 + sigma epsilon, of a model that gives the data
    prediction."""
    sigmas = np.array(levels, dtype=np.float64)
    if flow:
        return Problem(_straight(), Grid(1000.0 * sigmas, 1.0 - sigmas, sigmas), "sample", None)
    return Problem(_variance_exploding(), Grid(sigmas, np.ones_like(sigmas), sigmas), "sample", None)


def plan_of(table: StepTable, levels: Levels, calls: int = 1, *, promotes: bool = False, data: bool = True) -> Plan:
    """calls   of the model in each step but one to 0
    data    whether a step to 0 gives the model's output itself"""
    counts = tuple(calls if end else 1 for end in levels[1:])
    return Plan(table, counts, (promotes,) * len(table), returns_data=data and levels[-1] == 0.0)


@cached
def registered(
    method: str,
    levels: Levels,
    options: tuple[tuple[str, Any], ...],
    *,
    flow: bool = False,
    calls: int = 1,
    promotes: bool = False,
    data: bool = True,
) -> Plan:
    """A method of the registry with its options."""
    table = samplers.find(method).rows(problem_of(levels, flow), **dict(options))
    return plan_of(table, levels, calls, promotes=promotes, data=data)


def method(name: str, levels: Levels, options: Mapping[str, Any], **kind: Any) -> Plan:
    """`registered` with options by name."""
    return registered(name, levels, tuple(sorted(options.items())), **kind)


@cached
def lcm(levels: Levels, scales: tuple[tuple[float, float], ...]) -> Plan:
    """x' = a D + b z with (a, b) of each step's end."""

    def rows(problem: Problem) -> Iterable[Row]:
        points = problem.points()
        for start, end, (signal, noise) in zip(points[:-1], points[1:], scales, strict=True):
            yield make_row(problem, start, {"D": signal, "noise": noise}, to=end)

    problem = problem_of(levels)
    return plan_of(make_table("lcm", problem, rows(problem)), levels)


@cached
def euler_ancestral(levels: Levels, dtype: torch.dtype, eta: float, s_noise: float) -> Plan:
    """A step that goes down to 0 adds no noise."""
    problem, rounded = problem_of(levels), split_in(dtype, eta)

    def split(r: float, r1: float) -> tuple[float, float]:
        down, up = rounded(r, r1)
        return (down, up) if down else (0.0, 0.0)

    table = make_table("euler_ancestral", problem, ancestral_rows(problem, split, s_noise))
    return plan_of(table, levels, promotes=True)


def er_sde(levels: Levels, flow: bool, stages: int, s_noise: float, scaling: Callable[[float], float] | None) -> Plan:
    """scaling   phi(r)/r; None: the default"""
    if scaling is None:
        options = {"max_stage": stages, "s_noise": s_noise, "points": ER_SDE_POINTS}
        return method("er_sde", levels, options, flow=flow)
    problem = problem_of(levels, flow)
    table = er_sde_rows(problem, max_stage=stages, s_noise=s_noise, scaling=scaling, points=ER_SDE_POINTS)
    return plan_of(table, levels)


@cached
def sa_solver(
    levels: Levels,
    flow: bool,
    predictor: int,
    corrector: int,
    taus: tuple[float, ...],
    s_noise: float,
    pece: bool,
    simple: bool,
) -> Plan:
    """taus   of each step, as its end has it"""
    steps, to_data = len(levels) - 1, levels[-1] == 0.0
    half, orders = "bh1" if simple else None, []
    for i in range(steps):
        p, c = min(predictor, i + 1), min(corrector, i + 2)
        if to_data:
            p, c = min(p, steps - 1 - i), min(c, steps - 1 - i)
        # Nothing is known that could correct the last state, nor without a second call the one before the data.
        corrected = i + 1 < steps and (pece or not (to_data and i + 2 == steps))
        orders.append(Orders(max(p, 1), c if corrected else 0, half))
    problem, tau = problem_of(levels, flow), dict(zip(levels, taus, strict=False))
    rows = adams_rows(problem, "data", orders, lambda point: tau[point.sigma], s_noise=s_noise, pece=pece)
    table = make_table("sa_solver", problem, rows)
    counts = tuple(2 if pece and i > 0 and orders[i - 1].corrector else 1 for i in range(steps))
    return Plan(table, counts, (False,) * len(table), returns_data=to_data)


@cached
def dpmpp_sde_on_flow(levels: Levels, dtype: torch.dtype, eta: float, s_noise: float, r: float) -> Plan:
    """`get_ancestral_step` is rounded as that of exp(logit(s)) is in the dtype of sigmas: from nearly pure noise it
    goes down to a difference of nearly equal numbers."""
    problem, counts = problem_of(levels, flow=True), tuple(2 if end else 1 for end in levels[1:])

    def ratio(exact: float) -> torch.Tensor:
        return torch.tensor(exact / (1.0 + exact), dtype=dtype).logit().exp()

    def split(start: float, end: float) -> tuple[float, float]:
        if end == 0.0:
            return 0.0, 0.0
        down, up = get_ancestral_step(ratio(start), ratio(end), eta)
        return max(float(down), SMALLEST), float(up)

    aim = Aim(split, s_noise, sde=True)
    blocks = between_blocks(problem, counts, aim, "midpoint", {**DEFAULT_NODES, 2: (r,)})
    table = make_table("dpmpp_sde", problem, (row for block in blocks for row in block_rows(problem, block, Data)))
    return Plan(table, counts, (False,) * len(table), returns_data=levels[-1] == 0.0)


@cached
def unipc(levels: Levels, dtype: torch.dtype, variant: str, apart: bool) -> Plan:
    """apart   whether the corrected state has a row of its own, after which the model is not called again

    ComfyUI goes by way of sigma / sqrt(1 + sigma^2), in which, in the dtype of sigmas, little is left of a low level:
    the update and the data prediction are those of the level that is.
    """
    sigmas = torch.tensor(levels, dtype=dtype)
    log_alpha = 0.5 * torch.log(1.0 / (sigmas * sigmas + 1.0))
    lambdas = log_alpha - 0.5 * torch.log(1.0 - torch.exp(2.0 * log_alpha))
    problem, steps = problem_of(tuple(lambdas.double().neg().exp().tolist())), len(levels) - 1
    highest, orders = min(3, steps - 1), []
    for i in range(steps):
        p = min(highest, i + 1, steps - i)
        orders.append(Orders(p, 0 if i + 1 == steps else p + 1, variant))
    counts = tuple(2 if apart and i > 0 else 1 for i in range(steps))
    table = make_table("unipc", problem, adams_rows(problem, "data", orders, pece=apart))
    kept = 1.0 - problem.grid.sigmas[:-1] / np.array(levels[:-1])
    rows = table.rows.copy()
    rows[:, PREDICTION] = np.repeat(np.stack([kept, 1.0 - kept], axis=1), counts, axis=0)
    return Plan(table.with_rows(rows), counts, (False,) * len(table))
