"""The operators. Each is a formula, checked here once, run by the backend that `dispatch` chooses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.noise import STREAM_INITIAL
from fastdiff.ops import checks, network_checks, reference
from fastdiff.ops.calling import call as _call
from fastdiff.ops.calling import explanation, plain_norm, plain_step
from fastdiff.ops.convolution import conv_bias_residual, fold_upsample, upsample_conv
from fastdiff.ops.dispatch import REGISTERED, Report, report
from fastdiff.ops.langevin import langevin_correct
from fastdiff.ops.network import geglu, layer_norm_modulate
from fastdiff.ops.prepass import dynamic_threshold, guidance_weights, langevin_step_size
from fastdiff.ops.torch_noise import torch_normal

__all__ = [
    "Report",
    "StepOutput",
    "add_noise",
    "attention",
    "conv_bias_residual",
    "dynamic_threshold",
    "explain",
    "fold_upsample",
    "geglu",
    "group_norm_silu",
    "guidance_weights",
    "langevin_correct",
    "langevin_step_size",
    "layer_norm_modulate",
    "philox_normal",
    "report",
    "sampler_step",
    "torch_normal",
    "upsample_conv",
]


class StepOutput(NamedTuple):
    """What a step gives; None stands for what was not asked for."""

    x: Tensor
    history: Tensor | None
    anchor: Tensor | None
    model_input: Tensor | None


def sampler_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    *,
    counter: Tensor | None = None,
    anchor: Tensor | None = None,
    history: Sequence[Tensor] = (),
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    weights: Tensor | None = None,
    scales: Tensor | None = None,
    known: Tensor | None = None,
    known_noise: Tensor | None = None,
    mask: Tensor | None = None,
    new_history: bool = False,
    new_anchor: bool = False,
    model_input: torch.dtype | None = None,
    copies: int | None = None,
) -> StepOutput:
    """x' = sum_i row[NEW_X][i] * [x, m, D, anchor, hist1, hist2, hist3, noise][i], and likewise history' and anchor'.

    m = w_0 out_0 + sum_k w_k (out_k - out_0) over the G groups out_k of model_output, with (1, g), the row's guidance,
    where no weights are given; D = clamp(ax*x + am*m, -clip, clip). The coefficients are row `row` (plus `counter[0]`)
    of the table; `fastdiff.ops.row` names the columns. One pass over memory, float32 arithmetic. Then
        scales (b, d, z)   D = d * clamp(ax*x + am*m, -b, b), and the noise is multiplied by z
        learned variance   the noise is multiplied by exp(row[VARIANCE] * v)
        known and mask     x' becomes mask * x' + (1 - mask) * (signal * known + noise * known_noise) with row[KNOWN];
                           where mask is 1 or 0, only x' or only the other counts
    and model input' = input_scale * x'.

    x: (N, ...) float32, float16 or bfloat16; x' has its dtype. model_output: (G*N, C, ...) contiguous or channels-last,
    [uncond; cond] for G = 2; with 2C channels, the last C of the last group are v. table: (rows, 32) float32. counter:
    int64 (1,) on x's device, or None. anchor and up to three of history, newest first: x's shape, float32. noise: x's
    shape, or drawn as `philox_normal(seeds, step=row + counter, stream=STREAM_STEP)`. weights: float32 (N, G); needed
    beyond two groups. scales: float32 (N, 3). known: x's shape. mask: float32, 1 where the sample is made and 0 where
    the image stays; (1 or N, 1 or C, *spatial). known_noise: x's shape, or drawn as the sample's starting noise,
    `philox_normal(seeds, stream=STREAM_INITIAL)`. new_history, new_anchor: give those outputs (float32). model_input:
    the dtype of the next network input, which has x's channels and is given `copies` times, G unless said.

    A coefficient of zero means that its input is not read: nor is v unless noise is. A tensor that the row needs and
    that is missing is an InputError on the CPU; on a GPU, where the table cannot be read without waiting for it, the
    result is NaN.
    Source: DESIGN of fastdiff; the methods' papers are named in `fastdiff.samplers`. Variance channels: Nichol &
    Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021, equation 15. Keeping an image: Lugmayr et al.,
    "RePaint", 2022, equation 8.
    """
    if counter is seeds is weights is scales is known is known_noise is mask is model_input is copies is None:
        plain = plain_step(x, model_output, table, row, anchor, tuple(history), noise, new_history, new_anchor)
        if plain is not None:
            return StepOutput(plain[0], plain[1], plain[2], None)
    if not x.is_contiguous():
        x = x.contiguous()
    checks.sampler_step(x, model_output, table, row, counter, anchor, history, noise, seeds, weights)
    if not (scales is known is known_noise is mask is copies is None):
        checks.sampler_step_options(x, scales, known, known_noise, mask, copies)
    arguments = (
        x,
        model_output,
        table,
        row,
        counter,
        anchor,
        *(*history, None, None, None)[:3],
        noise,
        seeds,
        weights,
        scales,
        known,
        known_noise,
        mask,
        new_history,
        new_anchor,
        copies,
        model_input,
    )
    outputs = _call("sampler_step", arguments)
    return StepOutput(
        outputs[0],
        outputs[1] if new_history else None,
        outputs[2] if new_anchor else None,
        None if model_input is None else outputs[3],
    )


def add_noise(
    x: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    noise: Tensor | None = None,
    seeds: Tensor | None = None,
    step: int = 0,
    stream: int = STREAM_INITIAL,
) -> Tensor:
    """alpha[n] * x[n] + sigma[n] * noise[n]: the forward process q(x_t | x_0), the noise given or drawn in place.

    x: (N, ...) float32, float16 or bfloat16, contiguous or channels-last; the result has its dtype and layout.
    alpha, sigma: (N,) float32 on x's device. Exactly one of noise (x's shape, any of the three dtypes) and seeds (int64
    (N,)), from which the noise is `philox_normal(seeds, x.shape, step=step, stream=stream)`. float32 arithmetic.
    Source: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, equation 4.
    """
    checks.add_noise(x, alpha, sigma, noise, seeds, step, stream)
    layout = reference.memory_format(x)
    if noise is not None:
        noise = noise.contiguous(memory_format=layout)
    return _call("add_noise", (x.contiguous(memory_format=layout), alpha, sigma, noise, seeds, step, stream))


def philox_normal(
    seeds: Tensor,
    shape: Sequence[int],
    *,
    step: int = 0,
    stream: int = STREAM_INITIAL,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of which sample n depends on seeds[n] only: Philox4x32-10 and Box-Muller.

    Key = the 64 bits of the seed; counter = (e / 4, step, stream) with e the element's index inside the sample; the
    words w0, w1 give r cos(2 pi u2), r sin(2 pi u2) with r = sqrt(-2 ln u1), u1 = w0 / 2^32 + 2^-33, u2 = w1 / 2^32;
    w2, w3 give the next two. The words are equal on every backend, the normals to a few units in the last place.

    seeds: int64 (N,). shape: (N, ...). step: 0 to 2^32 - 1. The result is contiguous, on seeds' device.
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    checks.philox_normal(seeds, shape, step, stream, dtype)
    return _call("philox_normal", (seeds, shape, step, stream, dtype))


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    silu: bool = True,
    addend: Tensor | None = None,
    residual: Tensor | None = None,
    second: Tensor | None = None,
    return_sum: bool = False,
) -> Any:
    """y = silu((h - mean) / sqrt(var + eps) * weight + bias) with h = x + addend[n, c] + residual; y, or (y, h).

    Mean and biased variance are taken over each sample's group of C / groups channels, of the unrounded h. With
    `second`, h = concat([x, second]) + addend: the channels of both, C = C1 + C2, which are never brought together in
    memory. A group may have channels of either.

    x: (N, C, *spatial) float32, float16 or bfloat16, contiguous or channels-last; y and h keep its dtype and layout.
    weight, bias: (C,), x's dtype or float32. addend: (N, C), x's dtype or float32. residual: x's shape and dtype.
    second: (N, C2, *spatial), x's dtype and layout; then x is (N, C1, *spatial), and there is no residual.
    silu=False leaves the activation out. float32 arithmetic and statistics, with no cancellation for large means.
    Source: Wu & He, "Group Normalization", 2018; Elfwing et al., "Sigmoid-Weighted Linear Units", 2017.
    """
    if residual is None and not return_sum:
        plain = plain_norm(x, groups, weight, bias, eps, silu, addend, second)
        if plain is not None:
            return plain
    network_checks.group_norm_silu(x, groups, weight, bias, addend, residual, second)
    layout = reference.memory_format(x, second)
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    arguments = (
        x.contiguous(memory_format=layout),
        groups,
        weight if weight is None else weight.contiguous(),
        bias if bias is None else bias.contiguous(),
        eps,
        silu,
        addend if addend is None else addend.contiguous(),
        residual,
        second,
        return_sum,
    )
    y, h = _call("group_norm_silu", arguments)
    return (y, h) if return_sum else y


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale * q k^T + mask) v, for self and cross attention.

    q: (B, H, Lq, D); k, v: (B, H, Lk, D); float32, float16 or bfloat16, equal; D at most 256; any strides. mask:
    broadcastable to (B, H, Lq, Lk), bool (True = attend) or floating (added). scale: 1 / sqrt(D) unless given. A row
    whose every key is masked gives 0. float32 softmax and accumulation.
    The result (B, H, Lq, D) is a view of contiguous (B, Lq, H, D) memory, so that joining the heads copies nothing.
    Source: Vaswani et al., "Attention Is All You Need", 2017, equation 1.
    """
    checks.attention(q, k, v, mask)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if mask is not None:
        mask = mask.expand(q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    return _call("attention", (q, k, v, mask, 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)))


def explain(name: str, *args: Any, **kwargs: Any) -> str:
    """Which backend would run `ops.<name>(*args, **kwargs)`, and why each other would not; nothing is computed.

    Errors: those of the operator for the same arguments; InputError for an unknown name.
    """
    if name not in REGISTERED:
        raise InputError(f"explain: unknown operator {name!r}; expected one of {', '.join(REGISTERED)}")
    return explanation(lambda: globals()[name](*args, **kwargs))
