"""Checks of the arguments of the operators that run before `sampler_step`."""

from __future__ import annotations

import math

from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops.checks import _floating, _same_device, _seeds, _shape, group_weights, prediction


def guidance_weights(model_output: Tensor, weights: Tensor, rescale: float, channels: int | None) -> None:
    name, shape = "guidance_weights", model_output.shape
    _floating(name, "model_output", model_output)
    if model_output.dim() < 2 or model_output.numel() == 0:
        raise InputError(
            f"{name}: model_output has shape {tuple(shape)}; expected (G * N, C, ...) with at least one element"
        )
    samples, groups = weights.shape if weights.dim() == 2 else (0, 0)
    if groups < 2 or samples * groups != shape[0]:
        raise InputError(
            f"{name}: weights has shape {tuple(weights.shape)}, model_output {shape[0]} samples; "
            "expected (N, G) with G at least 2 and G * N samples"
        )
    group_weights(name, weights, model_output, (samples, groups))
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
    prediction(name, x, model_output, table, row, counter, weights)
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
    prediction(name, x, model_output, table, row, counter, weights)
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
