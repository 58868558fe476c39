"""The public functions of convolutions: a 3x3 one after nearest upsampling, and the folding of its weight."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops.calling import call
from fastdiff.ops.checks import _floating, _same_device, _shape
from fastdiff.ops.reference import memory_format

_FOLDED = 16
"""Outputs whose weights are folded at a time."""


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """conv3x3(nearest2x(x)) + bias with zeros around: four 2x2 convolutions of x, one for each pixel of a 2x2 block.

    y[n, o, 2i + a, 2j + b] = bias[o] + sum_{c, p, q} W[2a + b, o, c, p, q] * x[n, c, i + a + p - 1, j + b + q - 1],
    which is 4/9 of the products: W = `fold_upsample(weight)` holds the sums of the taps that meet one pixel of x.

    x: (N, C, H, W) float32, float16 or bfloat16, contiguous or channels-last. weight: (4 * Cout, C, 2, 2), x's dtype;
    fastest in the channels-last memory that `fold_upsample` gives. bias: (Cout,), x's dtype. The result (N, Cout, 2H,
    2W) has x's dtype and layout. float32 accumulation. A caller that changes the 3x3 weight folds it anew.
    Source: Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016.
    """
    name = "upsample_conv"
    _floating(name, "x", x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise InputError(f"{name}: x has shape {tuple(x.shape)}; expected (N, C, H, W) with C, H and W at least 1")
    channels, outputs = x.shape[1], weight.shape[0] // 4 if weight.dim() else 0
    if outputs == 0 or weight.shape != (4 * outputs, channels, 2, 2):
        raise InputError(
            f"{name}: weight has shape {tuple(weight.shape)}; expected (4 * Cout, {channels}, 2, 2); "
            "pass fold_upsample(weight of the 3x3 convolution)"
        )
    if bias is not None:
        _shape(name, "bias", bias, (outputs,))
    for argument, value in (("weight", weight), ("bias", bias)):
        if value is not None and value.dtype != x.dtype:
            raise InputError(f"{name}: {argument} is {value.dtype}; expected {x.dtype} (as x)")
    _same_device(name, x, weight=weight, bias=bias)
    x = x.contiguous(memory_format=memory_format(x))
    return call(name, (x, weight, bias if bias is None else bias.contiguous()))


def fold_upsample(weight: Tensor) -> Tensor:
    """W[2a + b, o, c, p, q] = sum of weight[o, c, r, s] over r in R(a, p) and s in R(b, q), for `upsample_conv`.

    R(0, 0) = {0}, R(0, 1) = {1, 2}, R(1, 0) = {0, 1}, R(1, 1) = {2}: for output row 2i + a, tap r reads the row
    2i + a + r - 1 of the upsampled x, which is row i + a + p - 1 of x.

    weight: (Cout, Cin, 3, 3), any floating dtype, any device. Gives (4 * Cout, Cin, 2, 2) in channels-last memory and
    weight's dtype, summed in float64 and rounded once. Differentiable.
    Errors: InputError for another shape or dtype.
    """
    _floating("fold_upsample", "weight", weight)
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise InputError(
            f"fold_upsample: weight has shape {tuple(weight.shape)}; expected (Cout, Cin, 3, 3), of a convolution of "
            "one group"
        )
    # Some outputs at a time: in float64 all would take eight times the weight's memory.
    parts = []
    for part in weight.split(_FOLDED):
        phases = [columns for rows in _halves(part.double(), 2) for columns in _halves(rows, 3)]
        parts.append(torch.stack(phases).to(weight.dtype))
    return torch.cat(parts, dim=1).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The two taps of an even output along `dim`, and those of an odd one."""
    first, middle, last = weight.unbind(dim)
    return torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)
