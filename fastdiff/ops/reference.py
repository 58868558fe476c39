"""The specification of every operator: plain PyTorch, float32 or better inside, no tricks.

Signatures are those of the registered operators. float64 inputs are computed in float64, which is how the tests get
the truth that every backend is held to. All functions are differentiable where the mathematics is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.noise import STREAM_INITIAL, STREAM_STEP
from fastdiff.ops.row import (
    CLIP,
    GUIDANCE,
    INPUT_SCALE,
    INPUTS,
    KNOWN,
    NEW_ANCHOR,
    NEW_HISTORY,
    NEW_X,
    PREDICTION,
    VARIANCE,
)

_MASK32 = 0xFFFFFFFF


def wide(x: Tensor) -> Tensor:
    """The tensor in the dtype that arithmetic is done in: float32, or float64 if it came so."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def memory_format(x: Tensor, second: Tensor | None = None) -> torch.memory_format:
    """The layout outputs take from this input: channels-last if it is that and not contiguous, else contiguous.

    Of two inputs that are joined along the channels: x's, or that of `second` where x has either, as at one channel.
    """
    if not x.is_contiguous():
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return torch.channels_last
        if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
            return torch.channels_last_3d
    elif second is not None:
        layout = memory_format(second)
        return layout if x.is_contiguous(memory_format=layout) else torch.contiguous_format
    return torch.contiguous_format


def philox_words(seeds: Tensor, blocks: Tensor, step: int, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 of key = seed and counter = (block low, step, stream, block high): four int64 tensors of words."""
    k0, k1 = seeds & _MASK32, (seeds >> 32) & _MASK32
    c0, c3 = blocks & _MASK32, (blocks >> 32) & _MASK32
    c1, c2 = torch.full_like(blocks, step), torch.full_like(blocks, stream)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def philox_normal(seeds: Tensor, shape: Sequence[int], step: int, stream: int, dtype: torch.dtype) -> Tensor:
    count = math.prod(shape[1:])
    blocks = torch.arange((count + 3) // 4, device=seeds.device).expand(len(seeds), -1)
    words = philox_words(seeds[:, None], blocks, step, stream)
    normals = []
    for radius_word, angle_word in (words[:2], words[2:]):
        radius = torch.sqrt(-2.0 * torch.log(radius_word.double() * 2.0**-32 + 2.0**-33))
        angle = angle_word.double() * (2.0 * math.pi * 2.0**-32)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    values = torch.stack(normals, dim=-1).reshape(len(seeds), -1)[:, :count].reshape(tuple(shape))
    return values.to(torch.float32).to(dtype)


def add_noise(
    x: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | None, seeds: Tensor | None, step: int, stream: int
) -> Tensor:
    if noise is None:
        assert seeds is not None  # checked by the public function
        noise = philox_normal(seeds, x.shape, step, stream, torch.float32)
    per_sample = (-1,) + (1,) * (x.dim() - 1)
    noised = alpha.reshape(per_sample) * wide(x) + sigma.reshape(per_sample) * wide(noise)
    return noised.to(x.dtype).contiguous(memory_format=memory_format(x))


def group_norm_silu(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    addend: Tensor | None,
    residual: Tensor | None,
    second: Tensor | None,
    return_sum: bool,
) -> tuple[Tensor, Tensor]:
    h = wide(x) if second is None else torch.cat([wide(x), wide(second)], dim=1)
    if addend is not None:
        h = h + wide(addend).reshape(*addend.shape, *(1,) * (x.dim() - 2))
    if residual is not None:
        h = h + wide(residual)
    if not h.requires_grad:
        h = h.contiguous()  # PyTorch 2.13 crashes in the channels-last backward of an input that needs no gradient
    scale = None if weight is None else weight.to(h.dtype)
    shift = None if bias is None else bias.to(h.dtype)
    y = torch.group_norm(h, groups, scale, shift, eps)  # F.group_norm refuses a group of one element
    layout = memory_format(x, second)
    y = (F.silu(y) if silu else y).to(x.dtype).contiguous(memory_format=layout)
    if not return_sum:
        return y, x.new_empty(0)
    total = h.to(x.dtype).contiguous(memory_format=layout)
    return y, total.clone() if addend is None and residual is None else total


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = wide(q) @ wide(k).transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)
        nothing = (scores == -math.inf).all(dim=-1, keepdim=True)
        weights = torch.softmax(scores.masked_fill(nothing, 0.0), dim=-1).masked_fill(nothing, 0.0)
    else:
        weights = torch.softmax(scores, dim=-1)
    out = (weights @ wide(v).to(weights.dtype)).to(q.dtype)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def conv_bias_residual(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: list[int], padding: list[int]
) -> Tensor:
    y = F.conv2d(wide(x), wide(weight), None if bias is None else wide(bias), stride, padding)
    if residual is not None:
        y = y + wide(residual)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))


def convolved(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> tuple[int, int, int, int]:
    """The shape of the result of `conv_bias_residual`."""
    rows, columns = ((x.shape[2 + d] + 2 * padding[d] - weight.shape[2 + d]) // stride[d] + 1 for d in range(2))
    return x.shape[0], weight.shape[0], rows, columns


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    each = None if bias is None else wide(bias).repeat(4)
    return interleave_phases(F.conv2d(wide(x), wide(weight), each, padding=1), x)


def interleave_phases(phases: Tensor, x: Tensor) -> Tensor:
    """y[n, o, 2i + a, 2j + b] = phases[n, (2a + b) * C + o, i + a, j + b], in the dtype and layout of the x before."""
    n, channels, (h, w) = len(x), phases.shape[1] // 4, x.shape[2:]
    shape = (n, channels, 2 * h, 2 * w)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    for a in range(2):
        for b in range(2):
            first = (2 * a + b) * channels
            y[:, :, a::2, b::2] = phases[:, first : first + channels, a : a + h, b : b + w]
    return y


def sampler_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    counter: Tensor | None,
    anchor: Tensor | None,
    hist1: Tensor | None,
    hist2: Tensor | None,
    hist3: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    weights: Tensor | None,
    scales: Tensor | None,
    known: Tensor | None,
    known_noise: Tensor | None,
    mask: Tensor | None,
    new_history: bool,
    new_anchor: bool,
    copies: int | None,
    model_input: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    c, index = row_of("sampler_step", table, row, counter)
    state = wide(x)
    outputs, variance = split_output(wide(model_output), x.shape)
    m = guided(outputs, c[GUIDANCE], weights)
    bound, data_factor, noise_factor = (c[CLIP], 1.0, 1.0) if scales is None else _per_sample(scales, like=state)

    blocks = [NEW_X] + [NEW_HISTORY] * new_history + [NEW_ANCHOR] * new_anchor
    needed = {name for block in blocks for name, value in zip(INPUTS, c[block], strict=True) if value != 0.0}
    values = {"x": state, "m": m, "anchor": anchor, "hist1": hist1, "hist2": hist2, "hist3": hist3, "noise": noise}
    if "D" in needed:
        prediction = combine(c[PREDICTION], (state, m), like=state)
        values["D"] = data_factor * prediction.clamp(-bound, bound)
    if "noise" in needed:
        if noise is None and seeds is not None:
            noise = philox_normal(seeds, x.shape, index, STREAM_STEP, torch.float32)
        z = noise_factor * wide(_present(noise, "noise", index))
        if c[VARIANCE] != 0.0:
            z = z * torch.exp(c[VARIANCE] * _present(variance, "variance", index))
        values["noise"] = z
    for name in needed:
        _present(values[name], name, index)

    def total(block: slice) -> Tensor:
        return combine(c[block], [values.get(name) for name in INPUTS], like=state)

    next_x = total(NEW_X)
    if known is not None and mask is not None:
        if c[KNOWN][1] != 0.0:
            if known_noise is None and seeds is not None:
                known_noise = philox_normal(seeds, x.shape, 0, STREAM_INITIAL, torch.float32)
            _present(known_noise, "known_noise", index)
        next_x = _blend(mask.to(state.dtype), next_x, combine(c[KNOWN], (known, known_noise), like=state))
    history = total(NEW_HISTORY) if new_history else state.new_empty(0)
    new_anchors = total(NEW_ANCHOR) if new_anchor else state.new_empty(0)
    if model_input is None:
        next_input = x.new_empty(0)
    else:
        next_input = torch.cat([(c[INPUT_SCALE] * next_x).to(model_input)] * (copies or len(outputs)))
    return next_x.to(x.dtype, copy=True), history, new_anchors, next_input


_REMEDIES = {
    "noise": "noise or seeds",
    "known_noise": "known_noise or seeds",
    "variance": "a model_output with twice the channels of x",
}


def _present(value: Tensor | None, name: str, row: int) -> Tensor:
    if value is None:
        raise InputError(
            f"sampler_step: row {row} of the table uses {name}, which was not given; pass {_REMEDIES.get(name, name)}"
        )
    return value


def row_of(name: str, table: Tensor, row: int, counter: Tensor | None) -> tuple[list[Any], int]:
    """The coefficients of row + counter, and that index; InputError of the operator `name` where there is none."""
    index = row + (0 if counter is None else int(counter))
    if not 0 <= index < len(table):
        raise InputError(f"{name}: row + counter = {index} is outside the table's {len(table)} rows")
    return table[index].tolist(), index


def split_output(output: Tensor, shape: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """(G, N, C, ...): the groups of the batch; and the variance channels of the last one, (N, C, ...), or None."""
    groups = output.unflatten(0, (-1, shape[0]))
    if len(shape) < 2 or output.shape[1] == shape[1]:
        return groups, None
    means, variances = groups.chunk(2, dim=2)
    return means, variances[-1]


def guided(outputs: Tensor, guidance: float, weights: Tensor | None) -> Tensor:
    """w_0 * out_0 + sum over k of w_k * (out_k - out_0), with (1, guidance) for weights where none are given."""
    base = outputs[0]
    if weights is None:
        return base if len(outputs) == 1 else base + guidance * (outputs[1] - base)
    return weighted(weights, torch.cat([outputs[:1], outputs[1:] - base]))


def weighted(weights: Tensor, terms: Tensor) -> Tensor:
    """sum over k of weights[n, k] * terms[k, n]; a weight of zero counts whatever the term is."""
    w = weights.t().to(terms.dtype).reshape(*terms.shape[:2], *(1,) * (terms.dim() - 2))
    return torch.where(w != 0.0, w * terms, 0.0).sum(dim=0)


def _per_sample(values: Tensor, *, like: Tensor) -> tuple[Tensor, ...]:
    """The columns of (N, K), each in the dtype of `like` and of a shape that broadcasts over its samples."""
    return values.to(like.dtype).reshape(*values.shape, *(1,) * (like.dim() - 1)).unbind(1)


def _blend(mask: Tensor, made: Tensor, kept: Tensor) -> Tensor:
    """mask * made + (1 - mask) * kept; at a mask of 1 and 0 only that which counts is read."""
    mixed = mask * made + (1.0 - mask) * kept
    return torch.where(mask == 1.0, made, torch.where(mask == 0.0, kept, mixed))


def combine(coefficients: Sequence[float], inputs: Sequence[Tensor | None], *, like: Tensor) -> Tensor:
    """sum of coefficient * input in the order given; an input whose coefficient is zero is not read."""
    total = torch.zeros_like(like, memory_format=torch.contiguous_format)
    for coefficient, value in zip(coefficients, inputs, strict=True):
        if coefficient != 0.0 and value is not None:
            total = total + coefficient * wide(value)
    return total
