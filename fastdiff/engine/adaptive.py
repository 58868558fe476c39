"""Sampling with steps chosen from an estimate of their error: a separate kind, which waits for the device at each step.

The state is y = x / alpha = x_0 + r epsilon, r = sigma / alpha, on the probability-flow ODE dy/dr = epsilon(y, r).
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import samplers
from fastdiff.engine.dpm_adaptive import dpm_adaptive
from fastdiff.engine.guidance import finite
from fastdiff.engine.network import AdaptiveStep, Callback, Network, too_tight
from fastdiff.engine.run import Denoiser
from fastdiff.engine.start import batch_shape, state_or_noise
from fastdiff.errors import InputError
from fastdiff.noise import seed_tensor
from fastdiff.samplers.adaptive import ADAPTIVE, AdaptiveInfo
from fastdiff.samplers.grid import Grid
from fastdiff.samplers.placement import LARGEST_SIGMA
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import fraction, whole
from fastdiff.schedules import Schedule

POSITIVE = ("rtol", "atol", "h_init")
UNIT = ("rtol", "atol", "accept_safety", "eta")
"""Options from 0 to 1; the other numbers go to 10."""


@dataclass(frozen=True)
class AdaptiveResult:
    """x           float32 samples
    evaluations    how often the network was called
    accepted, rejected   steps, of the sample that has most of them
    """

    x: Tensor
    evaluations: int
    accepted: int
    rejected: int


def run_adaptive(
    denoiser: Denoiser,
    *,
    method: str,
    schedule: Schedule,
    shape: Sequence[int],
    seeds: Iterable[int],
    prediction: str = "epsilon",
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    final_sigma: str = "zero",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    guidance: float | None = None,
    clip: float | None = None,
    x: Tensor | None = None,
    callback: Callback | None = None,
    **options: Any,
) -> AdaptiveResult:
    """Samples by y' = y + integral of epsilon(y, r) dr from r = sigma_max to sigma_min, y = x / alpha, r = sigma /
    alpha, with steps as long as the tolerances rtol and atol allow.

    method        "dpm_adaptive": DPM-Solver-12 or -23 (Lu et al. 2022) with a PID control of the step in log r, as in
                  k-diffusion. Options:
                    order       3 (pair 2-3) or 2 (pair 1-2)
                    rtol, atol  a step counts where the root mean square of (y_low - y_high) / max(atol, rtol |y|) is
                                about 1 at most
                    h_init      first step, in -log r
                    pcoeff, icoeff, dcoeff, accept_safety   of the control (`fastdiff.engine.dpm_adaptive.Controller`)
                    eta, s_noise   eta > 0 adds noise at each step, as `euler_ancestral` does
                    max_steps   the most steps that a sample may try, those in vain included
                    per_sample  True: each sample has its own steps, so that it depends on its own seed alone, and the
                                network is called until the last sample is done. False: one step size for the batch, as
                                in k-diffusion; a sample then depends on the others of its batch, within the tolerance.
                  "rk45": the ODE of Song et al. 2021 by the method of Dormand and Prince over log r, torchdiffeq's
                  dopri5 (pip install fastdiff-engine[adaptive]). Options:
                    max_steps   the most steps that are tried
                    rtol, atol  bound the error of every sample. The steps are the batch's, so that a sample depends
                                on the others of its batch, within the tolerance.
    denoiser, shape, seeds, device, dtype   those of `fastdiff.run`; t is float32. The rounding of a network in half
                  precision is an error too: it wants an rtol of 0.01 or more.
    schedule, prediction, clip       those of `fastdiff.samplers.build`
    sigma_min, sigma_max   ends in r. Default: those of the schedule, r = 80 at most unless it is of kind "ve"
    final_sigma   "zero": one more call of the network, and the samples are D at sigma_min; "schedule": they are y there
    guidance      m = uncond + guidance * (cond - uncond); the denoiser gets [uncond; cond]
    x             the state y to start from instead of drawn noise, float32 of that shape
    callback      called with an `AdaptiveStep` after each try of a step

    Errors: InputError for arguments that do not fit each other, a network output that is not finite or of another
    shape, tolerances that are not met within max_steps, and rk45 without torchdiffeq.
    """
    info = find(method)
    chosen = _options(info, options)
    problem = _problem(schedule, prediction, clip, sigma_min, sigma_max)
    keys = seed_tensor(seeds, device)
    full = batch_shape(shape, len(keys), dtype)
    if guidance is not None:
        finite("guidance", guidance)
    if final_sigma not in ("zero", "schedule"):
        raise InputError(f"final_sigma: expected zero or schedule, got {final_sigma!r}")
    first, last = problem.points(scaled=True)
    with torch.no_grad():
        y = state_or_noise(x, full, keys, first.init_scale)
        network = Network(denoiser, problem, dtype, guidance)
        end, accepted, rejected = _SOLVERS[method](network, y, first.ratio, last.ratio, keys, callback, **chosen)
        if final_sigma == "zero":
            end = network.data(end, [last.ratio])
    return AdaptiveResult(end, network.evaluations, accepted, rejected)


def find(method: str) -> AdaptiveInfo:
    """The adaptive method of that name; InputError if there is none."""
    if not isinstance(method, str) or method not in ADAPTIVE:
        raise InputError(
            f"method: expected one of {', '.join(ADAPTIVE)}, got {method!r}; methods with a fixed number of steps go "
            "through fastdiff.samplers.build and fastdiff.run"
        )
    return ADAPTIVE[method]


def _rk45(
    network: Network,
    y: Tensor,
    start: float,
    end: float,
    keys: Tensor,
    callback: Callback | None,
    *,
    rtol: float,
    atol: float,
    max_steps: int,
) -> tuple[Tensor, int, int]:
    """dy/dlog(r) = y - D, since the right step is then about the same all the way.

    Over r it shrinks with r: 218 calls of the network in place of 92 for the tests' mixture at the default tolerance,
    with 16 tries of 36 in vain.
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise InputError(
            "method: 'rk45' needs torchdiffeq; pip install 'fastdiff-engine[adaptive]', or use 'dpm_adaptive'"
        ) from error

    class Flow(torch.nn.Module):
        """The derivative, and what torchdiffeq tells of its steps."""

        accepted = rejected = 0

        def forward(self, log_r: Tensor, state: Tensor) -> Tensor:
            return state - network.data(state, [math.exp(log_r)])

        def callback_accept_step(self, log_r: Tensor, state: Tensor, length: Tensor) -> None:
            self.accepted += 1
            if callback is not None:
                callback(AdaptiveStep(network.evaluations, (math.exp(log_r),), (True,), state))

        def callback_reject_step(self, log_r: Tensor, state: Tensor, length: Tensor) -> None:
            self.rejected += 1
            if callback is not None:
                callback(AdaptiveStep(network.evaluations, (math.exp(log_r),), (False,), state))

    flow = Flow()
    ends = torch.tensor([math.log(start), math.log(end)], dtype=torch.float64, device=y.device)
    options = {
        # The largest of the samples' own errors: many good samples do not hide a bad one.
        "norm": lambda error: error.flatten(1).square().mean(dim=1).sqrt().max(),
        # The last step ends at the end; without this it goes beyond and the result is interpolated.
        "step_t": ends[1:],
        "max_num_steps": max_steps,
    }
    try:
        path = odeint(flow, y, ends, rtol=rtol, atol=atol, method="dopri5", options=options)
    except AssertionError as error:  # how torchdiffeq says that it has had enough
        raise too_tight(rtol, atol, max_steps) from error
    return path[-1], flow.accepted, flow.rejected


_SOLVERS: dict[str, Callable[..., tuple[Tensor, int, int]]] = {"dpm_adaptive": dpm_adaptive, "rk45": _rk45}


def _options(info: AdaptiveInfo, given: Mapping[str, Any]) -> dict[str, Any]:
    """The method's options with their defaults; InputError for an unknown one or a value out of range."""
    for name in given:
        if name not in info.options:
            near = difflib.get_close_matches(name, info.options, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"expected one of {', '.join(info.options)}"
            raise InputError(f"{info.name}: no option {name!r}; {hint}")
    chosen = {**info.options, **given}
    for name, value in chosen.items():
        if name == "order":
            whole(info.name, name, value, 2, 3)
        elif name == "max_steps":
            whole(info.name, name, value, 1, 1_000_000)
        elif name == "per_sample":
            if not isinstance(value, bool):
                raise InputError(f"{info.name}: {name}: expected True or False, got {value!r}")
        else:
            fraction(info.name, name, value, high=1.0 if name in UNIT else 10.0)
            if name in POSITIVE and not value > 0:
                raise InputError(f"{info.name}: {name}: expected a positive number, got {value!r}")
    return chosen


def _problem(
    schedule: Schedule, prediction: str, clip: float | None, sigma_min: float | None, sigma_max: float | None
) -> Problem:
    """The problem, its grid the two ends."""
    samplers.check(schedule, prediction, clip)
    most = math.inf if schedule.kind == "ve" else LARGEST_SIGMA
    low = float(schedule.noise_ratios[0]) if sigma_min is None else sigma_min
    high = min(float(schedule.noise_ratios[-1]), most) if sigma_max is None else sigma_max
    for name, value in (("sigma_min", low), ("sigma_max", high)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < math.inf:
            raise InputError(f"{name}: expected a positive number, got {value!r}")
    if not low < high:
        raise InputError(f"sigma_min, sigma_max: expected 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
    ratios = np.array([high, low])
    return Problem(schedule, Grid(schedule.timestep_of(ratios), *schedule.from_ratio(ratios)), prediction, clip)
