"""k_diffusion.sampling: its functions by name, signature, draws of noise and numbers.

A model is called as model(x, sigma * ones(N), **extra_args) and gives the data prediction D. x is (N, ...), of any
floating dtype and on any device; sigmas (steps + 1,) fall to the end of the run, which may be 0. The rows are those of
`fastdiff.samplers`, where the formulas are derived and the papers stand; one fused operator applies each.

Below, s and s' are the levels at which a step begins and ends, d = (x - D)/s. What all samplers take:

    extra_args      keywords for the model
    callback        told {'x', 'i', 'sigma', 'sigma_hat', 'denoised'} at each step, once D is known
    disable         whether there is no progress bar
    s_churn, s_tmin, s_tmax   before a step from s_tmin <= s <= s_tmax, fresh noise raises s to (1 + gamma) s with
                    gamma = min(s_churn / steps, sqrt(2) - 1)
    s_noise         what fresh noise is multiplied by
    eta             how much of a step fresh noise makes up for: 0 for none
    noise_sampler   (sigma, sigma_next) -> standard normal noise; None: PyTorch's own generator, or where it is said a
                    Brownian path over sigma (torchsde)

Errors: InputError for arguments that are none of this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from fastdiff.integrations.k_diffusion import plans
from fastdiff.integrations.k_diffusion.loop import Draw, Plan, check_state, read_levels, run
from fastdiff.integrations.k_diffusion.sigmas import append_zero, get_ancestral_step, to_d

__all__ = [
    "append_zero",
    "default_noise_sampler",
    "get_ancestral_step",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2m",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "to_d",
]

NoiseSampler = Callable[[Tensor, Tensor], Tensor]


def default_noise_sampler(x):
    """(sigma, sigma_next) -> standard normal noise like x, from PyTorch's own generator."""
    return lambda sigma, sigma_next: torch.randn_like(x)


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
    """x' = x + (s' - s) d.

    Noise is drawn at every step, whether churn adds it or not. Source: Karras et al. 2022, algorithm 2 without line 7.
    """
    churn = (s_churn, s_tmin, s_tmax, s_noise)
    return _churned("euler", model, x, sigmas, extra_args, callback, disable, churn)


@torch.no_grad()
def sample_euler_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None
):
    """x' = x + (down - s) d + up s_noise z, (down, up) = `get_ancestral_step`(s, s', eta).

    Source: k-diffusion (Katherine Crowson).
    """
    check_state(x)
    levels = read_levels(sigmas, falling=True)
    plan = plans.euler_ancestral(levels, sigmas.dtype, *plans.noise_options(eta, s_noise))
    draw = _at_the_end(plan, _sampler(noise_sampler, x), sigmas, levels)
    return run(model, x, sigmas, plan, _steps(levels, disable), extra_args=extra_args, callback=callback, draw=draw)


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
    """x~ = x + (s' - s) d, x' = x + (s' - s)(d + d~)/2, d~ at (x~, s'); Euler's step to s' = 0.

    Noise is drawn at every step, whether churn adds it or not. Source: Karras et al. 2022, algorithm 2.
    """
    churn = (s_churn, s_tmin, s_tmax, s_noise)
    return _churned("heun", model, x, sigmas, extra_args, callback, disable, churn)


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
    """x~ = x + (q - s) d, x' = x + (s' - s) d~, q = sqrt(s s') and d~ at (x~, q); Euler's step to s' = 0.

    Noise is drawn at every step, whether churn adds it or not. Source: k-diffusion (Katherine Crowson), after Lu et al.
    2022, "DPM-Solver", and Karras et al. 2022, algorithm 2.
    """
    churn = (s_churn, s_tmin, s_tmax, s_noise)
    return _churned("dpm2", model, x, sigmas, extra_args, callback, disable, churn)


@torch.no_grad()
def sample_dpm_2_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None
):
    """`sample_dpm_2`'s step from s to down, and then up s_noise z; (down, up) = `get_ancestral_step`(s, s', eta).

    A step whose `down` is 0 is Euler's and adds no noise. Source: k-diffusion (Katherine Crowson).
    """
    check_state(x)
    levels = read_levels(sigmas, falling=True)
    plan = plans.dpm2_ancestral(levels, sigmas.dtype, *plans.noise_options(eta, s_noise))
    noise = _sampler(noise_sampler, x)

    def draw(step: int, call: int, dtype: torch.dtype) -> Tensor | None:
        return noise(sigmas[step], sigmas[step + 1]) if call == 1 else None

    return run(model, x, sigmas, plan, _steps(levels, disable), extra_args=extra_args, callback=callback, draw=draw)


@torch.no_grad()
def sample_lms(model, x, sigmas, extra_args=None, callback=None, disable=None, order=4):
    """x' = x + sum_j c_j d_j, c_j the integral from s to s' of the Lagrange polynomial of the last `order` levels to j.

    order is from 1 to 4. Source: k-diffusion (Katherine Crowson); Adams and Bashforth 1883.
    """
    check_state(x)
    levels = read_levels(sigmas)
    plan = plans.lms(levels, order)
    return run(model, x, sigmas, plan, _steps(levels, disable), extra_args=extra_args, callback=callback)


@torch.no_grad()
def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """x' = (s'/s) x + (1 - e^-h) (D + (h / 2 h0) (D - D0)), h and h0 this and the last step in -log s.

    The first step and one to s' = 0 have no D0. Source: Lu et al. 2022, "DPM-Solver++", algorithm 2.
    """
    check_state(x)
    levels = read_levels(sigmas)
    plan = plans.dpmpp_2m(levels)
    return run(model, x, sigmas, plan, _steps(levels, disable), extra_args=extra_args, callback=callback)


def _steps(levels: plans.Levels, disable: bool | None) -> Any:
    return trange(len(levels) - 1, disable=disable)


def _churned(
    method: str, model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any, churn: Any
) -> Tensor:
    """Karras et al. 2022, algorithm 2, with the steps of `method`."""
    check_state(x)
    levels = read_levels(sigmas)
    if len(levels) == 1:
        return x
    plan = plans.churned(method, levels, sigmas.dtype, *churn)
    start, counts = x, plan.counts

    def draw(step: int, call: int, dtype: torch.dtype) -> Tensor | None:
        """What raises the next step's level: the last row of this one adds it."""
        if call + 1 < counts[step] or step + 1 == len(counts):
            return None
        return torch.randn_like(start, dtype=dtype)

    noise = torch.randn_like(x)
    if plan.gammas[0] > 0.0:
        x = x + noise * plan.first_noise
    return run(model, x, sigmas, plan, _steps(levels, disable), extra_args=extra_args, callback=callback, draw=draw)


def _sampler(noise_sampler: NoiseSampler | None, x: Tensor) -> NoiseSampler:
    return default_noise_sampler(x) if noise_sampler is None else noise_sampler


def _at_the_end(plan: Plan, noise: NoiseSampler, sigmas: Tensor, levels: plans.Levels) -> Draw:
    """Noise in the last row of each step but one to 0."""

    def draw(step: int, call: int, dtype: torch.dtype) -> Tensor | None:
        if call + 1 < plan.counts[step] or levels[step + 1] == 0.0:
            return None
        return noise(sigmas[step], sigmas[step + 1])

    return draw
