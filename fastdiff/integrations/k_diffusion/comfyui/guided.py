"""ComfyUI's CFG++ samplers: `guided_plans` has their steps.

Guidance has to leave the prediction without the condition behind: the model calls what model_options, one of its
keywords, has as "sampler_post_cfg_function", with {'denoised', 'uncond_denoised', ...}.
"""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.integrations.k_diffusion.comfyui import guided_plans as plans
from fastdiff.integrations.k_diffusion.comfyui.model import Unguided
from fastdiff.integrations.k_diffusion.comfyui.running import Run, run_of
from fastdiff.integrations.k_diffusion.loop import Draw, Plan


@torch.no_grad()
def sample_euler_cfg_pp(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler's method with CFG++."""
    return sample_euler_ancestral_cfg_pp(model, x, sigmas, extra_args, callback, disable, 0.0, 0.0, None)


@torch.no_grad()
def sample_euler_ancestral_cfg_pp(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None
):
    """Euler's method with CFG++ and ancestral noise."""
    run = run_of(model, x, sigmas, extra_args)
    if not run.steps:
        return x
    scaled = run.scaled(s_noise)
    plan = plans.euler(run.levels, run.flow, eta, scaled)
    draw = run.at_the_end(plan, run.noise(noise_sampler)) if eta > 0.0 and scaled > 0.0 else None
    return _sample(run, plan, callback, disable, draw)


@torch.no_grad()
def sample_dpmpp_2s_ancestral_cfg_pp(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None
):
    """DPM-Solver++ 2S with CFG++ and ancestral noise."""
    run = run_of(model, x, sigmas, extra_args)
    if not run.steps:
        return x
    scaled = run.scaled(s_noise)
    if run.flow:
        plan = plans.dpmpp_2s_flow(run.levels, eta, scaled)
    else:
        plan = plans.dpmpp_2s(run.levels, sigmas.dtype, eta, scaled)
    draw = run.at_the_end(plan, run.noise(noise_sampler)) if eta > 0.0 or not run.flow else None
    return _sample(run, plan, callback, disable, draw)


@torch.no_grad()
def sample_dpmpp_2m_cfg_pp(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """DPM-Solver++ 2M with CFG++."""
    run = run_of(model, x, sigmas, extra_args)
    return _sample(run, plans.dpmpp_2m(run.levels), callback, disable) if run.steps else x


@torch.no_grad()
def sample_res_multistep_cfg_pp(
    model, x, sigmas, extra_args=None, callback=None, disable=None, s_noise=1.0, noise_sampler=None
):
    """The refined exponential multistep method with CFG++. Noise is drawn at every step, and not added."""
    return sample_res_multistep_ancestral_cfg_pp(
        model, x, sigmas, extra_args, callback, disable, 0.0, s_noise, noise_sampler
    )


@torch.no_grad()
def sample_res_multistep_ancestral_cfg_pp(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None
):
    """The refined exponential multistep method with CFG++ and ancestral noise."""
    run = run_of(model, x, sigmas, extra_args)
    if not run.steps:
        return x
    plan = plans.res_multistep(run.levels, sigmas.dtype, eta, run.scaled(s_noise))
    return _sample(run, plan, callback, disable, run.at_the_end(plan, run.noise(noise_sampler)))


@torch.no_grad()
def sample_gradient_estimation_cfg_pp(model, x, sigmas, extra_args=None, callback=None, disable=None, ge_gamma=2.0):
    """Gradient estimation with CFG++, gamma = ge_gamma."""
    run = run_of(model, x, sigmas, extra_args)
    return _sample(run, plans.gradient_estimation(run.levels, ge_gamma), callback, disable) if run.steps else x


def _sample(run: Run, plan: Plan, callback: Any, disable: bool | None, draw: Draw | None = None) -> Any:
    unguided = Unguided(run.extra_args)
    return run.sample(plan, callback, disable, draw=draw, given=unguided, extra_args=unguided.extra_args)
