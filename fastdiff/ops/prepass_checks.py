"""Checks of the arguments of the operators that run before `sampler_step`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops.checks import _floating, _same_device, _seeds, _shape
from fastdiff.ops.row import ROW_SIZE


def guidance_weights(model_output: Tensor, weights: Tensor, rescale: float, channels: int | None) -> None:
    name, shape = "guidance_weights", model_output.shape
    _floating(name, "model_output", model_output)
    if model_output.dim() < 2 or model_output.numel() == 0:
        raise InputError(
            f"{name}: model_output has shape {tuple(shape)}; expected (G * N, C, ...) with at least one element"
        )
    _weights(name, model_output, weights)
    samples, groups = weights.shape
    if samples == 0 or groups < 2 or samples * groups != shape[0]:
        raise InputError(
            f"{name}: weights has shape {tuple(weights.shape)}, model_output {shape[0]} samples; "
            "expected (N, G) with G at least 2 and G * N samples"
        )
    if not 0.0 <= rescale <= 1.0:
        raise InputError(f"{name}: rescale is {rescale}; expected a number from 0 to 1")
    if channels is not None and not 1 <= channels <= shape[1]:
        raise InputError(f"{name}: channels is {channels}; expected 1 to {shape[1]}, or None for all")


def dynamic_threshold(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    counter: Tensor | None,
    weights: Tensor | None,
    percentile: float,
    maximum: float,
) -> None:
    name = "dynamic_threshold"
    _prediction(name, x, model_output, table, row, counter, weights)
    if not 0.0 <= percentile <= 1.0:
        raise InputError(f"{name}: percentile is {percentile}; expected a number from 0 to 1, such as 0.995")
    if not maximum > 0.0:
        raise InputError(f"{name}: maximum is {maximum}; expected a positive number, or infinity for none")


def langevin_step_size(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    counter: Tensor | None,
    weights: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    snr: float,
) -> None:
    name = "langevin_step_size"
    _prediction(name, x, model_output, table, row, counter, weights)
    if noise is None and seeds is None:
        raise InputError(f"{name}: expected noise or seeds, got neither; pass what sampler_step is given")
    if noise is not None:
        _floating(name, "noise", noise)
        _shape(name, "noise", noise, x.shape)
    if seeds is not None:
        _seeds(name, seeds, x.shape[0])
    _same_device(name, x, noise=noise, seeds=seeds)
    if not 0.0 < snr < math.inf:
        raise InputError(f"{name}: snr is {snr}; expected a positive finite number, such as 0.16")


def _prediction(
    name: str,
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    counter: Tensor | None,
    weights: Tensor | None,
) -> None:
    """Of what D = ax*x + am*m is made of."""
    _floating(name, "x", x)
    _floating(name, "model_output", model_output)
    if x.dim() == 0 or x.numel() == 0:
        raise InputError(f"{name}: x has shape {tuple(x.shape)}; expected (N, ...) with at least one element")
    groups = _groups(name, x, model_output)
    if weights is not None:
        _weights(name, model_output, weights)
        _shape(name, "weights", weights, (x.shape[0], groups))
    elif groups > 2:
        raise InputError(
            f"{name}: model_output has {groups} groups of samples; expected weights, float32 (N, {groups})"
        )
    if table.dtype != torch.float32 or table.dim() != 2 or table.shape[1] != ROW_SIZE or not table.is_contiguous():
        raise InputError(
            f"{name}: table is {table.dtype} of shape {tuple(table.shape)}; "
            f"expected contiguous float32 (rows, {ROW_SIZE})"
        )
    if not 0 <= row < table.shape[0]:
        raise InputError(f"{name}: row {row} is outside the table's {table.shape[0]} rows")
    if counter is not None and (counter.dtype != torch.int64 or counter.numel() != 1):
        raise InputError(f"{name}: counter is {counter.dtype} of {counter.numel()} elements; expected int64 (1,)")
    _same_device(name, x, model_output=model_output, table=table, counter=counter)


def _groups(name: str, x: Tensor, model_output: Tensor) -> int:
    """G of a model output (G * N, C or 2C, ...)."""
    wanted, came = x.shape, model_output.shape
    fits = len(came) == len(wanted) and came[0] > 0 and came[0] % wanted[0] == 0 and came[2:] == wanted[2:]
    if not fits or (len(wanted) > 1 and came[1] not in (wanted[1], 2 * wanted[1])):
        raise InputError(
            f"{name}: model_output has shape {tuple(came)}; expected G samples for each of x {tuple(wanted)}, "
            "with as many channels or twice as many"
        )
    return came[0] // wanted[0]


def _weights(name: str, model_output: Tensor, weights: Tensor) -> None:
    wanted = torch.float64 if model_output.dtype == torch.float64 else torch.float32
    if weights.dtype not in (torch.float32, wanted) or weights.dim() != 2 or not weights.is_contiguous():
        raise InputError(
            f"{name}: weights is {weights.dtype} of shape {tuple(weights.shape)}; expected contiguous float32 (N, G)"
        )
    _same_device(name, model_output, weights=weights)
