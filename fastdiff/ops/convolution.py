"""The public functions of convolutions: one that adds to its result, and a 3x3 one after nearest upsampling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops.calling import call
from fastdiff.ops.checks import _floating, _same_device, _shape
from fastdiff.ops.reference import convolved, memory_format


def conv_bias_residual(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
) -> Tensor:
    """conv(x) + bias + residual, all in one pass: what is added is read where the sums are written.

    y[n, o, i, j] = bias[o] + residual[n, o, i, j]
                    + sum_{c, r, s} weight[o, c, r, s] * x[n, c, i * stride[0] + r - padding[0],
                                                                 j * stride[1] + s - padding[1]],
    where x beyond its edge is 0.

    x: (N, C, H, W) float32, float16 or bfloat16, contiguous or channels-last, the latter being what every backend
    computes in. weight: (Cout, C, R, S), x's dtype; fastest in channels-last memory on a GPU. bias: (Cout,), x's dtype.
    residual: the result's shape, x's dtype. stride, padding: pixels, one number or (rows, columns). The result (N,
    Cout, (H + 2 padding[0] - R) // stride[0] + 1, likewise for columns) has x's dtype and layout. float32 accumulation.
    The sum is rounded once; where PyTorch's kernels run, on a contiguous x and on a GPU, before the residual is added
    as well.
    Errors: InputError for other shapes, dtypes and devices, a weight that is larger than the padded x, a padding below
    0 and a stride below 1.
    Source: Chetlur et al., "cuDNN: Efficient Primitives for Deep Learning", 2014, section 3 (convolution as a product
    of matrices); He et al., "Deep Residual Learning for Image Recognition", 2016, equation 1 (the residual).
    """
    name = "conv_bias_residual"
    _map(name, x)
    if weight.dim() != 4 or weight.shape[1] != x.shape[1] or 0 in weight.shape:
        raise InputError(
            f"{name}: weight has shape {tuple(weight.shape)}; expected (Cout, {x.shape[1]}, R, S), of a convolution of "
            "one group"
        )
    stride, padding = _pair(name, "stride", stride, 1), _pair(name, "padding", padding, 0)
    for d, side in enumerate(("rows", "columns")):
        padded = x.shape[2 + d] + 2 * padding[d]
        if weight.shape[2 + d] > padded:
            raise InputError(
                f"{name}: weight has {weight.shape[2 + d]} {side}; expected at most the {padded} of x with its padding"
            )
    if residual is not None:
        _shape(name, "residual", residual, convolved(x, weight, stride, padding))
    _operands(name, x, len(weight), weight=weight, bias=bias, residual=residual)
    x = x.contiguous(memory_format=memory_format(x))
    return call(name, (x, weight, bias if bias is None else bias.contiguous(), residual, stride, padding))


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
    _map(name, x)
    channels, outputs = x.shape[1], weight.shape[0] // 4 if weight.dim() else 0
    if outputs == 0 or weight.shape != (4 * outputs, channels, 2, 2):
        raise InputError(
            f"{name}: weight has shape {tuple(weight.shape)}; expected (4 * Cout, {channels}, 2, 2); "
            "pass fold_upsample(weight of the 3x3 convolution)"
        )
    _operands(name, x, outputs, weight=weight, bias=bias)
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
    phases = [columns for rows in _halves(weight.double(), 2) for columns in _halves(rows, 3)]
    return torch.cat(phases).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def _halves(weight: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The two taps of an even output along `dim`, and those of an odd one."""
    first, middle, last = weight.unbind(dim)
    return torch.stack((first, middle + last), dim), torch.stack((first + middle, last), dim)


def _map(name: str, x: Tensor) -> None:
    _floating(name, "x", x)
    if x.dim() != 4 or 0 in x.shape[1:]:
        raise InputError(f"{name}: x has shape {tuple(x.shape)}; expected (N, C, H, W) with C, H and W at least 1")


def _operands(name: str, x: Tensor, outputs: int, **others: Tensor | None) -> None:
    """What x is multiplied with and what is added: x's dtype and device, and one bias for each output."""
    bias = others["bias"]
    if bias is not None:
        _shape(name, "bias", bias, (outputs,))
    for argument, value in others.items():
        if value is not None and value.dtype != x.dtype:
            raise InputError(f"{name}: {argument} is {value.dtype}; expected {x.dtype} (as x)")
    _same_device(name, x, **others)


def _pair(name: str, argument: str, value: int | Sequence[int], least: int) -> list[int]:
    """The numbers for rows and columns."""
    pair = list(value) if isinstance(value, Sequence) else [value, value]
    if len(pair) != 2 or any(not isinstance(each, int) or each < least for each in pair):
        raise InputError(
            f"{name}: {argument} is {value!r}; expected an integer of at least {least}, or two (rows, columns)"
        )
    return pair
