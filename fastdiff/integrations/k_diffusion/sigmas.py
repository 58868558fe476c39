"""Noise levels as k-diffusion makes them, and what its samplers do with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError


def append_zero(x: Tensor) -> Tensor:
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


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """d = (x - D) / sigma, the derivative dx/dsigma of the probability flow. sigma: one number, or one per sample.

    Source: Karras et al. 2022, equation 3 with D for the score.
    """
    return (x - denoised) / append_dims(sigma, x.dim())


def get_ancestral_step(sigma_from: Any, sigma_to: Any, eta: float = 1.0) -> tuple[Any, Any]:
    """(d, u): u = min(s', eta sqrt(s'^2 (s^2 - s'^2) / s^2)), d = sqrt(s'^2 - u^2): go down to d, then add u z.

    sigma_from s and sigma_to s' are tensors or numbers; with eta = 0 it is (s', 0).
    Source: k-diffusion (Katherine Crowson).
    """
    if not eta:
        return sigma_to, 0.0
    variance = sigma_to**2 * (sigma_from**2 - sigma_to**2) / sigma_from**2
    sigma_up = min(sigma_to, eta * variance**0.5)
    return (sigma_to**2 - sigma_up**2) ** 0.5, sigma_up
