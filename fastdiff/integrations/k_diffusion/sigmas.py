"""Noise levels as k-diffusion makes them, and what its samplers do with them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError


def append_zero(x):
    """(x, 0): the levels of a run that ends at the data. x has one dimension."""
    return torch.cat([x, x.new_zeros([1])])


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """x with dimensions of size 1 appended until there are `target_dims`, so that one number goes with each sample.

    Errors: InputError where x has more.
    """
    missing = target_dims - x.dim()
    if missing < 0:
        raise InputError(f"append_dims: x has {x.dim()} dimensions; expected at most target_dims = {target_dims}")
    return x.reshape(*x.shape, *[1] * missing)


def to_d(x, sigma, denoised):
    """d = (x - D) / sigma, the derivative dx/dsigma of the probability flow. sigma: one number, or one per sample.

    Source: Karras et al. 2022, equation 3 with D for the score.
    """
    return (x - denoised) / append_dims(sigma, x.dim())


def get_ancestral_step(sigma_from, sigma_to, eta=1.0):
    """(d, u): u = min(s', eta sqrt(s'^2 (s^2 - s'^2) / s^2)), d = sqrt(s'^2 - u^2): go down to d, then add u z.

    sigma_from s and sigma_to s' are tensors or numbers; with eta = 0 it is (s', 0).
    Source: k-diffusion (Katherine Crowson).
    """
    if not eta:
        return sigma_to, 0.0
    variance = sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2
    sigma_up = min(sigma_to, eta * variance**0.5)
    return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up


def get_sigmas_karras(n, sigma_min, sigma_max, rho=7.0, device="cpu"):
    """sigma_i = (sigma_max^(1/rho) + i/(n - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, i < n, and 0.

    Source: Karras et al. 2022, equation 5.
    """
    _check_count(n)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return append_zero((high + torch.linspace(0, 1, n) * (low - high)) ** rho).to(device)


def get_sigmas_exponential(n, sigma_min, sigma_max, device="cpu"):
    """n levels even in log sigma from sigma_max to sigma_min, and 0."""
    _check_count(n)
    low, high = _logarithm("sigma_min", sigma_min), _logarithm("sigma_max", sigma_max)
    return append_zero(torch.linspace(high, low, n, device=device).exp())


def get_sigmas_polyexponential(n, sigma_min, sigma_max, rho=1.0, device="cpu"):
    """log sigma_i = log sigma_min + (1 - i/(n - 1))^rho (log sigma_max - log sigma_min), i < n, and 0."""
    _check_count(n)
    low, high = _logarithm("sigma_min", sigma_min), _logarithm("sigma_max", sigma_max)
    ramp = torch.linspace(1, 0, n, device=device) ** rho
    return append_zero(torch.exp(ramp * (high - low) + low))


def get_sigmas_vp(n, beta_d=19.9, beta_min=0.1, eps_s=1e-3, device="cpu"):
    """sigma = sqrt(e^(beta_d t^2/2 + beta_min t) - 1) at n times t even from 1 to eps_s, and 0.

    Source: Song et al. 2021, the VP SDE, as Karras et al. 2022, table 1, write it.
    """
    _check_count(n)
    t = torch.linspace(1, eps_s, n, device=device)
    return append_zero(torch.sqrt(torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1))


def _check_count(n: object) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or n < 0:
        raise InputError(f"n: expected a whole number of levels, got {n!r}")


def _logarithm(name: str, value: Any) -> float:
    if not value > 0:
        raise InputError(f"{name}: expected a positive number, got {value!r}")
    return math.log(value)
