"""The specification of the operators that run before `sampler_step` and give it numbers for each sample.

As in `fastdiff.ops.reference`, float64 inputs are computed in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.noise import STREAM_STEP
from fastdiff.ops.reference import combine, philox_normal, wide
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
        lost = _weighted(w[:, 2:], torch.where(square == 0.0, 0.0, along)[..., None])[:, 0]
        w = torch.cat([w[:, :1], (w[:, 1] - lost)[:, None], w[:, 2:]], dim=1)
    if rescale != 0.0:
        m = _weighted(w, torch.cat([outputs[:1], apart]))
        spread = _deviation(m)
        ratio = torch.where(spread == 0.0, 1.0, _deviation(outputs[1]) / spread)
        w = (rescale * ratio + (1.0 - rescale))[:, None] * w
    return w


def _weighted(weights: Tensor, terms: Tensor) -> Tensor:
    """sum over k of weights[n, k] * terms[k, n]; a weight of zero counts whatever the term is."""
    w = weights.t()[..., None]
    return torch.where(w != 0.0, w * terms, 0.0).sum(dim=0)


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
    c, index = _row("dynamic_threshold", table, row, counter)
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
    c, index = _row("langevin_step_size", table, row, counter)
    score = _prediction(c, x, model_output, weights)
    if noise is None:
        assert seeds is not None  # checked by the public function
        noise = philox_normal(seeds, x.shape, index, STREAM_STEP, torch.float32)
    of_noise, of_score = (value.reshape(len(x), -1).norm(dim=1) for value in (wide(noise), score))
    e = torch.where(of_score == 0.0, 0.0, 2.0 * (snr * of_noise / of_score).square())
    return torch.stack([torch.full_like(e, math.inf), e, (2.0 * e).sqrt()], dim=1).to(score.dtype)


def _row(name: str, table: Tensor, row: int, counter: Tensor | None) -> tuple[list[float], int]:
    """The coefficients of row + counter, and that index."""
    index = row + (0 if counter is None else int(counter))
    if not 0 <= index < len(table):
        raise InputError(f"{name}: row + counter = {index} is outside the table's {len(table)} rows")
    return table[index].tolist(), index


def _prediction(c: list[float], x: Tensor, model_output: Tensor, weights: Tensor | None) -> Tensor:
    """ax*x + am*m, not clipped; m as in `sampler_step`, of the first channels of the model output."""
    outputs = wide(model_output if x.dim() < 2 else model_output[:, : x.shape[1]])
    outputs = outputs.unflatten(0, (-1, len(x)))
    m = outputs[0]
    if weights is not None:
        terms = torch.cat([outputs[:1], outputs[1:] - m]).reshape(*outputs.shape[:2], -1)
        m = _weighted(weights.to(outputs.dtype), terms).reshape(x.shape)
    elif len(outputs) == 2:
        m = m + c[GUIDANCE] * (outputs[1] - m)
    return combine(c[PREDICTION], (wide(x), m), like=wide(x))
