"""Checks of the arguments of the operators in `network`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops.checks import _floating, _same_device, _shape


def geglu(x: Tensor) -> None:
    name = "geglu"
    _floating(name, "x", x)
    if x.dim() == 0 or x.shape[-1] % 2 or x.shape[-1] == 0:
        raise InputError(f"{name}: x has shape {tuple(x.shape)}; expected (..., 2H), the values and then their gates")


def layer_norm_modulate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
) -> None:
    name = "layer_norm_modulate"
    _floating(name, "x", x)
    if x.dim() < 2 or x.numel() == 0:
        raise InputError(f"{name}: x has shape {tuple(x.shape)}; expected (N, ..., C) with at least one element")
    of_channels, of_samples = (x.shape[-1],), (x.shape[0], x.shape[-1])
    for argument, value, shape in (
        ("weight", weight, of_channels),
        ("bias", bias, of_channels),
        ("scale", scale, of_samples),
        ("shift", shift, of_samples),
        ("gate", gate, of_samples),
    ):
        if value is not None:
            _shape(name, argument, value, shape)
            if value.dtype not in (x.dtype, torch.float32):
                raise InputError(f"{name}: {argument} is {value.dtype}; expected {x.dtype} (as x) or torch.float32")
    if residual is not None:
        _shape(name, "residual", residual, x.shape)
        if residual.dtype != x.dtype:
            raise InputError(f"{name}: residual is {residual.dtype}; expected {x.dtype} (as x)")
    elif gate is not None:
        raise InputError(f"{name}: gate was given without residual, which it multiplies; pass residual, or leave gate")
    _same_device(name, x, weight=weight, bias=bias, scale=scale, shift=shift, residual=residual, gate=gate)
