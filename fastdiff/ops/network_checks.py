"""Checks of the arguments of the operators in `network`, and of group_norm_silu's."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops.checks import _floating, _same_device, _shape
from fastdiff.ops.reference import memory_format


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
        _parameter(name, argument, value, shape, x)
    _residual(name, residual, x)
    if residual is None and gate is not None:
        raise InputError(f"{name}: gate was given without residual, which it multiplies; pass residual, or leave gate")
    _same_device(name, x, weight=weight, bias=bias, scale=scale, shift=shift, residual=residual, gate=gate)


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    addend: Tensor | None,
    residual: Tensor | None,
    second: Tensor | None,
) -> None:
    name = "group_norm_silu"
    _floating(name, "x", x)
    if x.dim() < 2 or x.numel() == 0:
        raise InputError(f"{name}: x has shape {tuple(x.shape)}; expected (N, C, ...) with at least one element")
    channels = x.shape[1]
    if second is not None:
        _second_input(x, second, residual)
        channels += second.shape[1]
    if groups < 1 or channels % groups:
        raise InputError(f"{name}: C={channels} is not divisible by groups={groups}")
    for argument, value, shape in (
        ("weight", weight, (channels,)),
        ("bias", bias, (channels,)),
        ("addend", addend, (x.shape[0], channels)),
    ):
        _parameter(name, argument, value, shape, x)
    _residual(name, residual, x)
    _same_device(name, x, weight=weight, bias=bias, addend=addend, residual=residual, second=second)


def _second_input(x: Tensor, second: Tensor, residual: Tensor | None) -> None:
    """More channels of group_norm_silu's input."""
    name = "group_norm_silu"
    if residual is not None:
        raise InputError(
            f"{name}: residual and second come together; expected at most one; add the residual to x first"
        )
    fits = second.dim() == x.dim() and second.shape[1] > 0
    if not fits or (second.shape[0], *second.shape[2:]) != (x.shape[0], *x.shape[2:]):
        expected = ", ".join(str(size) for size in (x.shape[0], "C2", *x.shape[2:]))
        raise InputError(f"{name}: second has shape {tuple(second.shape)}; expected ({expected}) with C2 at least 1")
    if second.dtype != x.dtype:
        raise InputError(f"{name}: second is {second.dtype}; expected {x.dtype} (as x)")
    layout = memory_format(x, second)
    if not second.is_contiguous(memory_format=layout):
        words = str(layout).removeprefix("torch.")
        raise InputError(
            f"{name}: second does not lie in {words}, which is x's layout; "
            f"pass second.contiguous(memory_format=torch.{words})"
        )


def _parameter(name: str, argument: str, value: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    """A weight or the like, in x's dtype or in float32."""
    if value is not None:
        _shape(name, argument, value, shape)
        if value.dtype not in (x.dtype, torch.float32):
            raise InputError(f"{name}: {argument} is {value.dtype}; expected {x.dtype} (as x) or torch.float32")


def _residual(name: str, residual: Tensor | None, x: Tensor) -> None:
    if residual is not None:
        _shape(name, "residual", residual, x.shape)
        if residual.dtype != x.dtype:
            raise InputError(f"{name}: residual is {residual.dtype}; expected {x.dtype} (as x)")
