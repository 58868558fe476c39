"""The samplers that ComfyUI has by the same names as k-diffusion, as it takes them where it calls.

k-diffusion's own where `model.conventions` says that another calls. ComfyUI differs in where noise comes from, in steps
on a flow, in drawing churn's noise only where it is added, and in the last step of `sample_lms`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tqdm.auto import trange

from fastdiff.integrations.k_diffusion import plans as k_plans
from fastdiff.integrations.k_diffusion import sampling
from fastdiff.integrations.k_diffusion.comfyui import ancestral, plans
from fastdiff.integrations.k_diffusion.comfyui.model import NoiseSampler, conventions, noise_source
from fastdiff.integrations.k_diffusion.comfyui.running import run_of
from fastdiff.integrations.k_diffusion.loop import run as run_rows
from fastdiff.integrations.k_diffusion.noise import normal_like
from fastdiff.ops.row import NEW_X


@torch.no_grad()
def sample_euler(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    s_churn=0.0,
    s_tmin=0.0,
    s_tmax=float("inf"),
    s_noise=1.0,
):
    """`sampling.sample_euler`."""
    churn = (s_churn, s_tmin, s_tmax, s_noise)
    if not conventions(model, extra_args):
        return sampling.sample_euler(model, x, sigmas, extra_args, callback, disable, *churn)
    return churned("euler", model, x, sigmas, extra_args, callback, disable, churn)


@torch.no_grad()
def sample_heun(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    s_churn=0.0,
    s_tmin=0.0,
    s_tmax=float("inf"),
    s_noise=1.0,
):
    """`sampling.sample_heun`."""
    churn = (s_churn, s_tmin, s_tmax, s_noise)
    if not conventions(model, extra_args):
        return sampling.sample_heun(model, x, sigmas, extra_args, callback, disable, *churn)
    return churned("heun", model, x, sigmas, extra_args, callback, disable, churn)


@torch.no_grad()
def sample_dpm_2(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    s_churn=0.0,
    s_tmin=0.0,
    s_tmax=float("inf"),
    s_noise=1.0,
):
    """`sampling.sample_dpm_2`."""
    churn = (s_churn, s_tmin, s_tmax, s_noise)
    if not conventions(model, extra_args):
        return sampling.sample_dpm_2(model, x, sigmas, extra_args, callback, disable, *churn)
    return churned("dpm2", model, x, sigmas, extra_args, callback, disable, churn)


@torch.no_grad()
def sample_heunpp2(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    s_churn=0.0,
    s_tmin=0.0,
    s_tmax=float("inf"),
    s_noise=1.0,
):
    """Heun++ (`fastdiff.samplers.heunpp2`). Noise is drawn at every step, whether churn adds it or not."""
    churn = (s_churn, s_tmin, s_tmax, s_noise)
    return churned("heunpp2", model, x, sigmas, extra_args, callback, disable, churn, always=True)


@torch.no_grad()
def sample_ddim(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    s_churn=0.0,
    s_tmin=0.0,
    s_tmax=float("inf"),
    s_noise=1.0,
):
    """`sample_euler`, which is DDIM in x / alpha."""
    return sample_euler(model, x, sigmas, extra_args, callback, disable, s_churn, s_tmin, s_tmax, s_noise)


def churned(
    method: str,
    model: Any,
    x: Any,
    sigmas: Any,
    extra_args: Any,
    callback: Any,
    disable: Any,
    churn: tuple[float, float, float, float],
    *,
    always: bool = False,
) -> Any:
    """Karras et al. 2022, algorithm 2, with the steps of `method`; noise is drawn `always`, or only where added."""
    setup = run_of(model, x, sigmas, extra_args)
    if not setup.steps:
        return x
    plan = k_plans.churned(method, setup.levels, sigmas.dtype, *churn)
    if method == "heunpp2":
        plan = replace(plan, counts=tuple(min(3, setup.steps - i) for i in range(setup.steps)))
    start = x

    def draw(step: int, call: int, dtype: torch.dtype) -> Any:
        """What raises the next step's level: the last row of this one adds it."""
        last = call + 1 == plan.counts[step] and step + 1 < setup.steps
        return normal_like(start, dtype=dtype) if last and (always or plan.gammas[step + 1] > 0.0) else None

    if always or plan.gammas[0] > 0.0:
        x = x + normal_like(x) * plan.first_noise
    bar = trange(setup.steps, disable=disable)
    return run_rows(model, x, sigmas, plan, bar, extra_args=extra_args, callback=callback, draw=draw)


@torch.no_grad()
def sample_euler_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None
):
    """`sampling.sample_euler_ancestral`; on a flow `ancestral.euler`; for ComfyUI a step down to 0 adds no noise."""
    given = (model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler)
    otherwise = _euler_ancestral if conventions(model, extra_args) else sampling.sample_euler_ancestral
    return _ancestral(otherwise, ancestral.euler, *given, drawn=eta > 0.0)


def _euler_ancestral(
    model: Any,
    x: Any,
    sigmas: Any,
    extra_args: Any,
    callback: Any,
    disable: Any,
    eta: float,
    s_noise: float,
    noise: NoiseSampler,
) -> Any:
    setup = run_of(model, x, sigmas, extra_args)
    if not setup.steps:
        return x
    plan = plans.euler_ancestral(setup.levels, sigmas.dtype, eta, s_noise)
    keeps = (plan.table.rows[:, NEW_X.start] != 0.0).tolist()
    source = setup.at_the_end(plan, noise)

    def draw(step: int, call: int, dtype: torch.dtype) -> Any:
        return source(step, call, dtype) if keeps[step] else None

    return setup.sample(plan, callback, disable, draw=draw)


@torch.no_grad()
def sample_dpm_2_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None
):
    """`sampling.sample_dpm_2_ancestral`; on a flow `ancestral.dpm_2`."""
    given = (model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler)
    return _ancestral(sampling.sample_dpm_2_ancestral, ancestral.dpm_2, *given, drawn=True)


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None
):
    """`sampling.sample_dpmpp_2s_ancestral`; on a flow `ancestral.dpmpp_2s`."""
    given = (model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler)
    return _ancestral(sampling.sample_dpmpp_2s_ancestral, ancestral.dpmpp_2s, *given, drawn=eta > 0.0)


def _ancestral(
    otherwise: Any,
    on_flow: Any,
    model: Any,
    x: Any,
    sigmas: Any,
    extra_args: Any,
    callback: Any,
    disable: Any,
    eta: float,
    s_noise: float,
    noise_sampler: NoiseSampler | None,
    *,
    drawn: bool,
) -> Any:
    """drawn   whether the sampler of a flow draws noise"""
    setup = run_of(model, x, sigmas, extra_args)
    if not setup.flow:
        noise = _noise(model, x, extra_args, noise_sampler)
        return otherwise(model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise)
    if not setup.steps:
        return x
    plan = on_flow(setup.levels, eta, setup.scaled(s_noise))
    draw = setup.at_the_end(plan, setup.noise(noise_sampler)) if drawn else None
    return setup.sample(plan, callback, disable, draw=draw)


def _noise(model: Any, x: Any, extra_args: Any, noise_sampler: NoiseSampler | None) -> NoiseSampler | None:
    """The caller's, that of the seed, or None for k-diffusion's own."""
    if noise_sampler is not None or not conventions(model, extra_args):
        return noise_sampler
    return noise_source(x, extra_args)


@torch.no_grad()
def sample_lms(model, x, sigmas, extra_args=None, callback=None, disable=None, order=4):
    """`sampling.sample_lms`; for ComfyUI a step to 0 gives D."""
    if not conventions(model, extra_args):
        return sampling.sample_lms(model, x, sigmas, extra_args, callback, disable, order)
    setup = run_of(model, x, sigmas, extra_args)
    if not setup.steps:
        return x
    plan = plans.method("ipndm_v", setup.levels, {"order": order}, promotes=True)
    return setup.sample(plan, callback, disable)


@torch.no_grad()
def sample_dpm_fast(
    model,
    x,
    sigma_min,
    sigma_max,
    n,
    extra_args=None,
    callback=None,
    disable=None,
    eta=0.0,
    s_noise=1.0,
    noise_sampler=None,
):
    """`sampling.sample_dpm_fast`."""
    noise = _noise(model, x, extra_args, noise_sampler)
    return sampling.sample_dpm_fast(
        model, x, sigma_min, sigma_max, n, extra_args, callback, disable, eta, s_noise, noise
    )


@torch.no_grad()
def sample_dpm_adaptive(
    model,
    x,
    sigma_min,
    sigma_max,
    extra_args=None,
    callback=None,
    disable=None,
    order=3,
    rtol=0.05,
    atol=0.0078,
    h_init=0.05,
    pcoeff=0.0,
    icoeff=1.0,
    dcoeff=0.0,
    accept_safety=0.81,
    eta=0.0,
    s_noise=1.0,
    noise_sampler=None,
    return_info=False,
):
    """`sampling.sample_dpm_adaptive`."""
    noise = _noise(model, x, extra_args, noise_sampler)
    steps = (order, rtol, atol, h_init, pcoeff, icoeff, dcoeff, accept_safety)
    return sampling.sample_dpm_adaptive(
        model, x, sigma_min, sigma_max, extra_args, callback, disable, *steps, eta, s_noise, noise, return_info
    )


@torch.no_grad()
def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """`sampling.sample_dpmpp_2m`."""
    return sampling.sample_dpmpp_2m(model, x, sigmas, extra_args, callback, disable)
