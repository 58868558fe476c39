"""Plans of the CFG++ samplers: steps towards the guided D along the noise that the unguided U predicts.

Rows read U, the prediction without the condition, as their anchor. s and s' are the levels at which a step begins and
ends, d = (x - U)/s. Source: Chung et al. 2024, "CFG++: Manifold-constrained Classifier Free Guidance for Diffusion
Models", algorithm 2; that samplers of more than one call or prediction are taken so, and how, is ComfyUI's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch

from fastdiff.integrations.k_diffusion.comfyui.ancestral import Descent, at_level, inner_level
from fastdiff.integrations.k_diffusion.comfyui.plans import Levels, cached, plan_of, problem_of
from fastdiff.integrations.k_diffusion.loop import Plan
from fastdiff.integrations.k_diffusion.plans import split_in
from fastdiff.ops.row import NEW_HISTORY
from fastdiff.samplers.euler import ancestral_step
from fastdiff.samplers.exponential import Data, corrections, log_ratio
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import Row, make_row, make_table


def _split(r: float, r1: float, eta: float) -> tuple[float, float]:
    """`ancestral_step`; from pure noise all of r' is fresh noise, whatever eta is, if it is not 0."""
    return (0.0, r1) if math.isinf(r) and eta else ancestral_step(r, r1, eta)


@cached
def euler(levels: Levels, flow: bool, eta: float, s_noise: float) -> Plan:
    """x' = alpha' D + alpha' down (x - alpha U)/s + alpha' up s_noise z."""

    def rows(problem: Problem) -> Iterator[Row]:
        for start, end in pairwise(problem.points()):
            down, up = _split(start.ratio, end.ratio, eta)
            slope = end.alpha * down / start.sigma
            new_x = {"D": end.alpha, "x": slope, "anchor": -slope * start.alpha, "noise": end.alpha * up * s_noise}
            yield make_row(problem, start, new_x, to=end)

    problem = problem_of(levels, flow)
    return plan_of(make_table("euler_cfg_pp", problem, rows(problem)), levels, promotes=True)


@cached
def dpmpp_2s(levels: Levels, dtype: torch.dtype, eta: float, s_noise: float) -> Plan:
    """DPM-Solver++ 2S with U for D from s to `down`, and then up s_noise z + D - U, D and U those of the first call."""

    def rows(problem: Problem) -> Iterator[Row]:
        for start, end in pairwise(problem.points()):
            down, up = split(start.ratio, end.ratio)
            if down == 0.0:
                yield make_row(problem, start, {"D": 1.0, "noise": up * s_noise}, to=end)
                continue
            middle = problem.at_ratio(math.sqrt(start.ratio * down))
            q, inner = down / start.ratio, middle.ratio / start.ratio
            known = {"x": q, "D": 1.0, "anchor": -1.0}
            yield make_row(problem, start, {"x": inner, "anchor": 1.0 - inner}, to=middle, history=known)
            last = {"hist1": 1.0, "anchor": 1.0 - q, "noise": up * s_noise}
            yield make_row(problem, middle, last, to=end)

    problem, split = problem_of(levels), split_in(dtype, eta)
    table = make_table("dpmpp_2s_cfg_pp", problem, rows(problem))
    return Plan(table, tuple(2 if split(r, r1)[0] else 1 for r, r1 in pairwise(levels)), (False,) * len(table))


@cached
def dpmpp_2s_flow(levels: Levels, eta: float, s_noise: float) -> Plan:
    """The same on a flow, with the steps of `ancestral` and (1 - s')(D - U)."""

    def rows(problem: Problem) -> Iterator[Row]:
        for start, end in pairwise(problem.points()):
            if end.sigma == 0.0:
                yield make_row(problem, start, {"D": 1.0}, to=end)
                continue
            step = Descent.between(start.sigma, end.sigma, eta)
            middle = at_level(problem, inner_level(step.start, step.down))
            inner, q = step.towards(middle.sigma), step.towards(step.down)
            known = {"x": step.scale * q, "D": end.alpha, "anchor": -end.alpha}
            yield make_row(problem, start, {"x": inner, "anchor": 1.0 - inner}, to=middle, history=known)
            last = {"hist1": 1.0, "anchor": step.scale * (1.0 - q), "noise": s_noise * step.noise}
            yield make_row(problem, middle, last, to=end)

    problem = problem_of(levels, flow=True)
    return plan_of(make_table("dpmpp_2s_cfg_pp", problem, rows(problem)), levels, 2, data=False)


@cached
def dpmpp_2m(levels: Levels) -> Plan:
    """x' = D + (s'/s)(x - U) + (1 - s'/s) (h / 2 h0)(D - U0), h and h0 this and the last step in -log s."""

    def rows(problem: Problem) -> Iterator[Row]:
        earlier = 0.0
        for start, end in pairwise(problem.points()):
            q, length = end.ratio / start.ratio, log_ratio(start.ratio, end.ratio)
            weight = (1.0 - q) * length / (2.0 * earlier) if earlier > 0.0 and q else 0.0
            new_x = {"x": q, "D": 1.0 + weight, "anchor": -q, "hist1": -weight}
            yield make_row(problem, start, new_x, to=end, history={"anchor": 1.0})
            earlier = length

    problem = problem_of(levels)
    return plan_of(make_table("dpmpp_2m_cfg_pp", problem, _but_last(rows(problem))), levels, data=False)


@cached
def res_multistep(levels: Levels, dtype: torch.dtype, eta: float, s_noise: float) -> Plan:
    """`fastdiff.samplers.res_multistep` from x + D - U, with U for D; the first step is `euler`'s."""

    def rows(problem: Problem) -> Iterator[Row]:
        earlier = 0.0
        for i, (start, end) in enumerate(pairwise(problem.points())):
            down, up = split(start.ratio, end.ratio)
            step, length = Data.propagate(start, 1.0, down), log_ratio(start.ratio, down)
            noise = {"noise": up * s_noise}
            if down == 0.0 or i == 0:
                new_x = {"x": step.x, "D": 1.0, "anchor": -step.x, **noise}
            else:
                weight = 0.0
                if length > 0.0 and earlier > 0.0:
                    (weight,) = (step.scale * w for w in corrections([-earlier / length], step.z, "heun"))
                unguided = step.q - weight - step.x
                new_x = {"x": step.x, "D": step.x, "anchor": unguided, "hist1": weight, **noise}
            yield make_row(problem, start, new_x, to=end, history={"anchor": 1.0})
            earlier = length

    problem, split = problem_of(levels), split_in(dtype, eta)
    return plan_of(make_table("res_multistep_cfg_pp", problem, _but_last(rows(problem))), levels, promotes=True)


@cached
def gradient_estimation(levels: Levels, gamma: float) -> Plan:
    """x' = D + s' d + (gamma - 1)(s' - s)(d - d0), d0 that of the step before."""

    def rows(problem: Problem) -> Iterator[Row]:
        for i, (start, end) in enumerate(pairwise(problem.points())):
            extra = (gamma - 1.0) * (end.sigma - start.sigma) if i > 0 and end.sigma else 0.0
            slope = (end.sigma + extra) / start.sigma
            new_x = {"D": 1.0, "x": slope, "anchor": -slope, "hist1": -extra}
            known = {"x": 1.0 / start.sigma, "anchor": -1.0 / start.sigma}
            yield make_row(problem, start, new_x, to=end, history=known)

    problem = problem_of(levels)
    return plan_of(make_table("gradient_cfg_pp", problem, _but_last(rows(problem))), levels, promotes=True)


def _but_last(rows: Iterator[Row]) -> Iterator[Row]:
    """The rows, of which the last one keeps nothing."""
    made = list(rows)
    yield from made[:-1]
    made[-1].values[NEW_HISTORY] = 0.0
    yield made[-1]
