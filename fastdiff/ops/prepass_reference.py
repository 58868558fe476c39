"""The specification of the operators that run before `sampler_step` and give it numbers for each sample.

As in `fastdiff.ops.reference`, float64 inputs are computed in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.noise import STREAM_STEP
from fastdiff.ops.reference import combine, guided, philox_normal, row_of, split_output, weighted, wide
from fastdiff.ops.row import CLIP, GUIDANCE, PREDICTION


def guidance_weights(
    model_output: Tensor, weights: Tensor, rescale: float, perpendicular: bool, channels: int | None
) -> Tensor:
    outputs = wide(model_output if channels is None else model_output[:, :channels])
    outputs = outputs.unflatten(0, (weights.shape[1], weights.shape[0])).flatten(2)
    w = weights.to(outputs.dtype, copy=True)
    apart = outputs[1:] - outputs[0]
    if perpendicular and len(apart) > 1:
        square = apart[0].square().sum(dim=-1)
        along = (apart[1:] * apart[0]).sum(dim=-1) / square
        lost = weighted(w[:, 2:], torch.where(square == 0.0, 0.0, along))
        w = torch.cat([w[:, :1], (w[:, 1] - lost)[:, None], w[:, 2:]], dim=1)
    if rescale != 0.0:
        spread = _deviation(guided(outputs, 1.0, w))
        ratio = torch.where(spread == 0.0, 1.0, _deviation(outputs[1]) / spread)
        w = (rescale * ratio + (1.0 - rescale))[:, None] * w
    return w


def _deviation(samples: Tensor) -> Tensor:
    """Standard deviation of each sample, up to a factor that cancels; 0 exactly where all its elements are equal."""
    return (samples - samples[:, :1]).std(dim=1, correction=0)


def dynamic_threshold(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    counter: Tensor | None,
    weights: Tensor | None,
    percentile: float,
    maximum: float,
) -> Tensor:
    c, index = row_of("dynamic_threshold", table, row, counter)
    bound = c[CLIP]
    if not 0.0 < bound < math.inf:
        raise InputError(f"dynamic_threshold: row {index} clips D at {bound}; expected a positive finite clip")
    sizes = _prediction(c, x, model_output, weights).abs().reshape(len(x), -1)
    ordered = sizes.sort(dim=1).values
    rank = percentile * (sizes.shape[1] - 1)
    low, high = ordered[:, math.floor(rank)], ordered[:, math.ceil(rank)]
    between = low + (rank - math.floor(rank)) * (high - low)
    quantile = torch.where(low == high, low, between)  # both may be infinite
    quantile = torch.where(sizes.isnan().any(dim=1), math.nan, quantile)
    s = quantile.clamp(bound, maximum)
    return torch.stack([s, bound / s, torch.ones_like(s)], dim=1)


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
) -> Tensor:
    c, index = row_of("langevin_step_size", table, row, counter)
    score = _prediction(c, x, model_output, weights)
    if noise is None:
        assert seeds is not None  # checked by the public function
        noise = philox_normal(seeds, x.shape, index, STREAM_STEP, torch.float32)
    of_noise, of_score = (value.reshape(len(x), -1).norm(dim=1) for value in (wide(noise), score))
    e = torch.where(of_score == 0.0, 0.0, 2.0 * (snr * of_noise / of_score).square())
    return torch.stack([torch.full_like(e, math.inf), e, (2.0 * e).sqrt()], dim=1).to(score.dtype)


def _prediction(c: list[float], x: Tensor, model_output: Tensor, weights: Tensor | None) -> Tensor:
    """ax*x + am*m, not clipped."""
    outputs, _ = split_output(wide(model_output), x.shape)
    return combine(c[PREDICTION], (x, guided(outputs, c[GUIDANCE], weights)), like=wide(x))
