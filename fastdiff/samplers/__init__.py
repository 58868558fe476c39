"""Samplers as tables: `build` computes every coefficient of a method once, in float64; `fastdiff.run` applies them."""

import difflib
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from fastdiff import parameterization
from fastdiff.errors import InputError
from fastdiff.samplers import (
    consistency,
    ddim,
    ddpm,
    deis,
    dpm2,
    dpm_singlestep,
    dpm_solver,
    dpmpp,
    dpmpp_inverse,
    dpmpp_sde,
    er_sde,
    euler,
    flow,
    gradient_estimation,
    grid,
    heun,
    heunpp,
    ipndm,
    lms,
    pndm,
    res_multistep,
    restart,
    sa_solver,
    score_sde,
    seeds,
    unipc,
)
from fastdiff.samplers.adaptive import ADAPTIVE
from fastdiff.samplers.grid import GRID_OPTIONS, Grid
from fastdiff.samplers.problem import Problem, Threshold
from fastdiff.samplers.table import MethodInfo, StepTable
from fastdiff.schedules import Schedule

__all__ = ["ADAPTIVE", "GRID_OPTIONS", "Grid", "MethodInfo", "StepTable", "Threshold", "build", "find", "methods"]

_METHODS: Mapping[str, MethodInfo] = MappingProxyType(
    {
        info.name: info
        for info in (
            ddpm.INFO,
            ddim.DDIM,
            ddim.DDIM_INVERSE,
            pndm.PNDM,
            pndm.PLMS,
            ipndm.IPNDM,
            ipndm.IPNDM_V,
            lms.INFO,
            euler.EULER,
            euler.EULER_ANCESTRAL,
            gradient_estimation.INFO,
            heun.INFO,
            heunpp.INFO,
            dpm2.DPM2,
            dpm2.DPM2_ANCESTRAL,
            restart.INFO,
            dpm_solver.DPM_SOLVER,
            dpm_solver.DPM_SOLVER_SDE,
            dpm_singlestep.DPM_SOLVER_SINGLESTEP,
            dpmpp.DPMPP_2M,
            dpmpp.DPMPP_3M,
            dpmpp_inverse.INFO,
            dpm_singlestep.DPMPP_SINGLESTEP,
            dpmpp.DPMPP_2M_SDE,
            dpmpp.DPMPP_3M_SDE,
            dpmpp_sde.DPMPP_2S_ANCESTRAL,
            dpmpp_sde.DPMPP_SDE,
            res_multistep.INFO,
            seeds.SEEDS_2,
            seeds.SEEDS_3,
            er_sde.INFO,
            unipc.INFO,
            deis.INFO,
            sa_solver.INFO,
            consistency.LCM,
            consistency.TCD,
            consistency.CONSISTENCY,
            flow.EULER,
            flow.HEUN,
            score_sde.PF_ODE,
            score_sde.REVERSE_SDE,
        )
    }
)


def methods() -> Mapping[str, MethodInfo]:
    """Every method by name."""
    return _METHODS


def find(method: str) -> MethodInfo:
    """The method of that name; InputError with near names if there is none."""
    if isinstance(method, str) and method in _METHODS:
        return _METHODS[method]
    if isinstance(method, str) and method in ADAPTIVE:
        raise InputError(f"method: {method!r} chooses its own steps and has no table; use fastdiff.run_adaptive")
    near = difflib.get_close_matches(str(method).lower().replace("-", "_"), [*_METHODS, *ADAPTIVE], n=2, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"expected one of {', '.join(_METHODS)}"
    raise InputError(f"method: no method {method!r}; {hint}")


def build(
    method: str,
    *,
    schedule: Schedule,
    steps: int | None = None,
    prediction: str = "epsilon",
    clip: float | None = None,
    dynamic_threshold: float | None = None,
    dynamic_maximum: float = math.inf,
    **options: Any,
) -> StepTable:
    """The StepTable of a method: one row of coefficients per model evaluation.

    schedule            the one the network was trained on (`fastdiff.schedules`)
    steps               1 to schedule.steps
    prediction          what the network gives: `fastdiff.parameterization.SCHEDULE_KINDS` says on which schedules
    clip                bound of the data prediction's absolute value, or None
    dynamic_threshold   bounds the data prediction D of each sample by s, the quantile of |D| at this fraction (0.995),
                        where that is more than the clip (1 if clip is None), and scales D by clip / s. Saharia et al.
                        2022, section 2.3
    dynamic_maximum     the largest s
    options             the method's own (`methods()[name].options`) and the grid's
                        (`fastdiff.samplers.grid.GridOptions`)

    Errors: InputError for an unknown method or option, steps out of range, a prediction or method that does not fit
    the schedule.
    """
    info = find(method)
    check(schedule, prediction, clip)
    _check_kind(info, schedule)
    threshold = _threshold(dynamic_threshold, dynamic_maximum, clip)
    if threshold is not None and clip is None:
        clip = 1.0
    for name in options:
        if name not in info.options and name not in GRID_OPTIONS:
            raise _unknown_option(info, name)
    if all(options.get(name) is None for name in ("spacing", "timesteps", "sigmas")):
        options = {**info.grid, **{name: value for name, value in options.items() if name != "spacing"}}
    points = grid.build(schedule, steps, grid.options_from(options))
    points = points.reversed() if info.inverse else points
    return info.rows(Problem(schedule, points, prediction, clip, threshold), **options)


def check(schedule: Schedule, prediction: str, clip: float | None) -> None:
    """InputError unless there is such a network: `prediction` on `schedule`, with D bounded by `clip`."""
    if not isinstance(schedule, Schedule):
        raise InputError(
            f"schedule: expected a Schedule, got {schedule!r}; use fastdiff.schedules.cosine(1000) or another"
        )
    parameterization.check(prediction, schedule)
    if clip is not None and (isinstance(clip, bool) or not isinstance(clip, int | float) or not clip > 0):
        raise InputError(f"clip: expected a positive number or None, got {clip!r}")


def _check_kind(info: MethodInfo, schedule: Schedule) -> None:
    if info.kinds and schedule.kind not in info.kinds:
        others = [name for name, other in _METHODS.items() if other.kinds and schedule.kind in other.kinds]
        use = f"; use {others[0]} or a method for every schedule" if others else "; use a method for every schedule"
        raise InputError(
            f"{info.name}: needs a {' or '.join(info.kinds)} schedule, got {schedule.name!r} ({schedule.kind}){use}"
        )


def _threshold(percentile: float | None, maximum: float, clip: float | None) -> Threshold | None:
    if percentile is None:
        if maximum != math.inf:
            raise InputError(f"dynamic_maximum: expected dynamic_threshold with it, got {maximum!r} alone")
        return None
    if isinstance(percentile, bool) or not isinstance(percentile, int | float) or not 0.0 < percentile <= 1.0:
        raise InputError(f"dynamic_threshold: expected a fraction above 0 and up to 1, got {percentile!r}")
    if isinstance(maximum, bool) or not isinstance(maximum, int | float) or not maximum >= (clip or 1.0):
        raise InputError(f"dynamic_maximum: expected a number of at least the clip, {clip or 1.0:g}, got {maximum!r}")
    return Threshold(float(percentile), float(maximum))


def _unknown_option(info: MethodInfo, name: str) -> InputError:
    known = (*info.options, *GRID_OPTIONS)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(known)}"
    return InputError(f"{info.name}: no option {name!r}; {hint}")
