"""The plan of each sampler for a run's levels: rows of `fastdiff.samplers` for states x = x_0 + sigma epsilon.

Plans are kept: the same levels and options give the same object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from fastdiff import samplers, schedules
from fastdiff.errors import InputError
from fastdiff.integrations.k_diffusion.loop import Plan
from fastdiff.integrations.k_diffusion.sigmas import get_ancestral_step
from fastdiff.samplers import dpm2, euler
from fastdiff.samplers.churn import added_noise, churn_from
from fastdiff.samplers.dpm_singlestep import DEFAULT_NODES, between_blocks, fast_orders
from fastdiff.samplers.euler import Split
from fastdiff.samplers.exponential import Data, Form, Noise
from fastdiff.samplers.grid import Grid
from fastdiff.samplers.lms import MOST_SLOPE_ROUNDING, slope_rounding
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.singlestep import Aim, block_rows
from fastdiff.samplers.table import StepTable, fraction, make_table, whole

Levels = tuple[float, ...]

_KEPT_PLANS = 64
_SMALLEST = 1e-30
_APART = 1e-12
_MOST_SHRINK = 16.0
# By type as well: True is no 1.0.
_cached = lru_cache(maxsize=_KEPT_PLANS, typed=True)


@lru_cache(maxsize=1)
def _schedule() -> schedules.Schedule:
    return schedules.ve(2, sigma_min=1.0, sigma_max=2.0)


def problem_of(levels: Sequence[float]) -> Problem:
    """States x_0 + sigma epsilon at these levels, of a model that gives the data prediction."""
    sigmas = np.array(levels, dtype=np.float64)
    return Problem(_schedule(), Grid(sigmas, np.ones_like(sigmas), sigmas), "sample", None)


def split_in(dtype: torch.dtype, eta: float) -> Split:
    """`get_ancestral_step` with its rounding in the dtype of sigmas, and of these operations.

    What is left of a long step is a small difference: one of half a unit in the last place of its root moves the level
    by 1e-4 of itself where s / s' is 40, and beyond 4000 the step goes down to 0.
    """

    def split(r: float, r1: float) -> tuple[float, float]:
        down, up = get_ancestral_step(torch.tensor(r, dtype=dtype), torch.tensor(r1, dtype=dtype), eta)
        return float(down), float(up)

    return split


def logarithmic(levels: Levels, dtype: torch.dtype) -> Levels:
    """The levels as samplers that step in -log sigma round them: in many short steps the rounding adds up."""
    logarithms = (torch.tensor(level, dtype=dtype).log() for level in levels)
    return tuple(math.exp(logarithm) for logarithm in logarithms)


def integrals_in(dtype: torch.dtype) -> str:
    """The precision in which k-diffusion integrates: that of a number of sigmas less one of Python, which before NumPy
    2 is float64. bfloat16, which NumPy lacks and k-diffusion refuses, is integrated in float32."""
    name = "float32" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
    return (0.0 - np.ones(1, dtype=name)[0]).dtype.name


@_cached
def churned(
    method: str, levels: Levels, dtype: torch.dtype, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> Plan:
    """euler, heun or dpm2. The bounds are rounded as the levels were, which may lie on them."""
    problem = problem_of(levels)
    options = {"s_churn": s_churn, "s_tmin": _round(s_tmin, dtype), "s_tmax": _round(s_tmax, dtype), "s_noise": s_noise}
    table = samplers.find(method).rows(problem, **options)
    churn, first = churn_from(method, **options), problem.points(scaled=True)[0]
    return Plan(
        table,
        tuple(1 if method == "euler" or end == 0.0 else 2 for end in levels[1:]),
        (True,) * len(table),
        gammas=tuple(churn.gamma(problem, level) for level in levels[:-1]),
        first_noise=s_noise * added_noise(first, churn.raise_level(problem, first)),
    )


@_cached
def lms(levels: Levels, dtype: torch.dtype, order: int) -> Plan:
    table = samplers.find("lms").rows(problem_of(levels), order=order, integrals=integrals_in(dtype))
    return _single(table, promotes=True)


@_cached
def lms_multiplies_rounding(levels: Levels, dtype: torch.dtype, order: int) -> bool:
    """Whether other arithmetic than k-diffusion's ends in other digits: somewhere the state becomes many times smaller,
    or a weight is large, as where many levels lie close and the last step goes on to 0.

    Repeated levels, at which k-diffusion divides by 0, are no such case.
    """
    steps = list(pairwise(levels))
    if any(start == end for start, end in steps):
        return False
    precision = integrals_in(dtype)
    return any(
        math.hypot(1.0, start) >= _MOST_SHRINK * math.hypot(1.0, end)
        or not slope_rounding(levels, row, order, precision) < MOST_SLOPE_ROUNDING
        for row, (start, end) in enumerate(steps)
    )


@_cached
def euler_ancestral(levels: Levels, dtype: torch.dtype, eta: float, s_noise: float) -> Plan:
    problem = problem_of(levels)
    table = make_table("euler_ancestral", problem, euler.ancestral_rows(problem, split_in(dtype, eta), s_noise))
    return _single(table, promotes=True)


@_cached
def dpm2_ancestral(levels: Levels, dtype: torch.dtype, eta: float, s_noise: float) -> Plan:
    """A step down to 0, which rounding can make of any very long one, is Euler's and adds no noise."""
    problem, rounded = problem_of(levels), split_in(dtype, eta)

    def split(r: float, r1: float) -> tuple[float, float]:
        down, up = rounded(r, r1)
        return (down, up) if down else (0.0, 0.0)

    table = make_table("dpm2_ancestral", problem, dpm2.ancestral_rows(problem, split, s_noise))
    counts = tuple(2 if split(r, r1)[0] else 1 for r, r1 in pairwise(levels))
    return Plan(table, counts, (True,) * len(table))


@_cached
def dpmpp_2s_ancestral(levels: Levels, dtype: torch.dtype, eta: float, s_noise: float) -> Plan:
    rounded = split_in(dtype, eta)

    def split(r: float, r1: float) -> tuple[float, float]:
        down, up = rounded(r, r1)
        return min(down, r * (1.0 - _APART)), up

    orders = [2 if split(r, r1)[0] else 1 for r, r1 in pairwise(levels)]
    table = _blocks("dpmpp_2s_ancestral", levels, orders, Aim(split, s_noise), Data)
    return Plan(table, tuple(orders), tuple(order == 1 for order in orders for _ in range(order)))


@_cached
def dpmpp_sde(levels: Levels, dtype: torch.dtype, eta: float, s_noise: float, r: float) -> Plan:
    rounded = split_in(dtype, eta)

    def split(r: float, r1: float) -> tuple[float, float]:
        # A step that rounding takes down to 0 still has its two calls; in lambda 0 is too far.
        down, up = rounded(r, r1)
        return (max(down, _SMALLEST) if r1 else 0.0), up

    counts = tuple(2 if end else 1 for end in levels[1:])
    table = _blocks("dpmpp_sde", logarithmic(levels, dtype), counts, Aim(split, s_noise, sde=True), Data, node=r)
    return Plan(table, counts, tuple(count == 1 for count in counts for _ in range(count)))


@_cached
def dpmpp_2m(levels: Levels, dtype: torch.dtype) -> Plan:
    table = samplers.find("dpmpp_2m").rows(problem_of(logarithmic(levels, dtype)), lower_order_final=False)
    return _single(table, promotes=False)


@_cached
def dpmpp_2m_sde(levels: Levels, dtype: torch.dtype, eta: float, s_noise: float, solver: str) -> Plan:
    return _multistep_sde("dpmpp_2m_sde", logarithmic(levels, dtype), eta=eta, s_noise=s_noise, solver=solver)


@_cached
def dpmpp_3m_sde(levels: Levels, dtype: torch.dtype, eta: float, s_noise: float) -> Plan:
    return _multistep_sde("dpmpp_3m_sde", logarithmic(levels, dtype), eta=eta, s_noise=s_noise, curvature="half")


@_cached
def dpm_fast(levels: Levels, evaluations: int, eta: float, s_noise: float) -> Plan:
    orders = fast_orders("sample_dpm_fast", evaluations, 3, "between", len(levels) - 1)
    aim = Aim(partial(euler.ancestral_step, eta=eta), s_noise, floor=levels[-1] if eta else 0.0)
    table = _blocks("dpm_fast", levels, orders, aim, Noise)
    return Plan(table, tuple(orders), (False,) * len(table))


def _single(table: StepTable, *, promotes: bool) -> Plan:
    """One row a step."""
    return Plan(table, (1,) * len(table), (promotes,) * len(table))


def _multistep_sde(method: str, levels: Levels, **options: Any) -> Plan:
    table = samplers.find(method).rows(problem_of(levels), lower_order_final=False, **options)
    return Plan(table, (1,) * len(table), (False,) * len(table), returns_data=levels[-1] == 0.0)


def _blocks(
    method: str, levels: Levels, orders: Sequence[int], aim: Aim, form: Form, *, node: float = 0.5
) -> StepTable:
    problem = problem_of(_apart(levels))
    blocks = between_blocks(problem, orders, aim, "midpoint", {**DEFAULT_NODES, 2: (node,)})
    return make_table(method, problem, (row for block in blocks for row in block_rows(problem, block, form)))


def _apart(levels: Levels) -> Levels:
    """The same levels, none equal to the one before: a step of no length has as many calls as any other."""
    result = [levels[0]]
    for level in levels[1:]:
        result.append(level * (1.0 - _APART) if level == result[-1] else level)
    return tuple(result)


def fast_steps(evaluations: Any) -> int:
    """The steps of DPM-Solver-fast; InputError where so many calls of the model make none."""
    return whole("sample_dpm_fast", "n", evaluations, 1, 100_000) // 3 + 1


def node(r: Any) -> float:
    """The place of an inner point; InputError where it is none."""
    if isinstance(r, bool) or not isinstance(r, int | float) or not 0.0 < r <= 1.0:
        raise InputError(f"sample_dpmpp_sde: r: expected a number above 0 and at most 1, got {r!r}")
    return float(r)


def _round(value: float, dtype: torch.dtype) -> float:
    return torch.tensor(value, dtype=dtype).item()


def noise_options(eta: Any, s_noise: Any) -> tuple[float, float]:
    """Both as numbers; InputError where one is negative or none."""
    return fraction("sampler", "eta", eta, high=10.0), fraction("sampler", "s_noise", s_noise, high=10.0)
