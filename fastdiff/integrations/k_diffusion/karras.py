"""k-diffusion's samplers of the form of Karras et al. 2022: Euler, Heun, DPM2, their ancestral forms, and LMS.

`sampling` says what their arguments have in common.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.integrations.k_diffusion import plans
from fastdiff.integrations.k_diffusion.loop import Callback, Model, begin, check_output, run, steps_of
from fastdiff.integrations.k_diffusion.noise import at_the_end, noise_or_default, normal_like
from fastdiff.integrations.k_diffusion.sigmas import to_d
from fastdiff.samplers.lms import quadrature
from fastdiff.samplers.table import whole
from fastdiff.samplers.terms import ADAMS_BASHFORTH


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
    levels = begin(x, sigmas, falling=True)
    if len(levels) == 1:
        return x
    plan = plans.euler_ancestral(levels, sigmas.dtype, *plans.noise_options(eta, s_noise))
    draw = at_the_end(plan, noise_or_default(noise_sampler, x), sigmas, levels)
    return run(model, x, sigmas, plan, steps_of(levels, disable), extra_args=extra_args, callback=callback, draw=draw)


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
    levels = begin(x, sigmas, falling=True)
    if len(levels) == 1:
        return x
    plan = plans.dpm2_ancestral(levels, sigmas.dtype, *plans.noise_options(eta, s_noise))
    noise = noise_or_default(noise_sampler, x)

    def draw(step: int, call: int, dtype: torch.dtype) -> Tensor | None:
        return noise(sigmas[step], sigmas[step + 1]) if call == 1 else None

    return run(model, x, sigmas, plan, steps_of(levels, disable), extra_args=extra_args, callback=callback, draw=draw)


@torch.no_grad()
def sample_lms(model, x, sigmas, extra_args=None, callback=None, disable=None, order=4):
    """x' = x + sum_j c_j d_j, c_j the integral from s to s' of the Lagrange polynomial of the last `order` levels to j.

    Beyond order 4 a row has no room for the slopes, and each step is done term by term; so are runs that multiply what
    k-diffusion rounds, in few or very many steps. c_j is `linear_multistep_coeff`, computed once for the same levels;
    without SciPy it is the exact integral, from which k-diffusion's differs by 1e-2 at 1000 steps.
    Source: k-diffusion (Katherine Crowson); Adams and Bashforth 1883.
    """
    levels = begin(x, sigmas)
    if len(levels) == 1:
        return x
    beyond = whole("sample_lms", "order", order, 1, 100) > len(ADAMS_BASHFORTH)
    if beyond or plans.lms_multiplies_rounding(levels, sigmas.dtype, order):
        return _long_multistep(model, x, sigmas, levels, extra_args or {}, callback, disable, order)
    plan = plans.lms(levels, sigmas.dtype, order)
    return run(model, x, sigmas, plan, steps_of(levels, disable), extra_args=extra_args, callback=callback)


def _long_multistep(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    levels: plans.Levels,
    extra_args: dict[str, Any],
    callback: Callback | None,
    disable: bool | None,
    order: int,
) -> Tensor:
    """`sample_lms` of any order, in k-diffusion's own arithmetic."""
    s_in = x.new_ones([x.shape[0]])
    slopes: list[Tensor] = []
    precision = plans.integrals_in(sigmas.dtype)
    for i in steps_of(levels, disable):
        denoised = model(x, sigmas[i] * s_in, **extra_args)
        check_output(denoised, x)
        slopes = [to_d(x, sigmas[i], denoised), *slopes[: order - 1]]
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + sum(_coefficient(len(slopes), levels, i, j, precision) * slope for j, slope in enumerate(slopes))
    return x


def linear_multistep_coeff(order, t, i, j):
    """c_j of `sample_lms`: the integral from t[i] to t[i + 1] of the Lagrange polynomial of t[i], t[i - 1], ... to j.

    It is taken as k-diffusion takes it (`fastdiff.samplers.lms.quadrature`), in the precision that t has.
    order   how many levels the polynomial has, at most i + 1; t: numbers, or an array or tensor of them
    """
    if order - 1 > i:
        raise InputError(f"order: expected at most {i + 1} at step {i}, got {order!r}")
    return _coefficient(order, t, i, j, plans.integrals_in(getattr(t, "dtype", torch.float64)))


def _coefficient(order: int, t: Any, i: int, j: int, precision: str) -> float:
    return quadrature(tuple(float(t[i - k]) for k in range(order)), float(t[i + 1]), j, precision)


def _churned(
    method: str, model: Any, x: Tensor, sigmas: Tensor, extra_args: Any, callback: Any, disable: Any, churn: Any
) -> Tensor:
    """Karras et al. 2022, algorithm 2, with the steps of `method`."""
    levels = begin(x, sigmas)
    if len(levels) == 1:
        return x
    plan = plans.churned(method, levels, sigmas.dtype, *churn)
    start, counts = x, plan.counts

    def draw(step: int, call: int, dtype: torch.dtype) -> Tensor | None:
        """What raises the next step's level: the last row of this one adds it."""
        if call + 1 < counts[step] or step + 1 == len(counts):
            return None
        return normal_like(start, dtype)

    noise = normal_like(x)
    if plan.gammas[0] > 0.0:
        x = x + noise * plan.first_noise
    return run(model, x, sigmas, plan, steps_of(levels, disable), extra_args=extra_args, callback=callback, draw=draw)
