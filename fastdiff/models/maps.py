"""What all blocks do with a feature map besides convolving it: sums, norms, and division by a scale."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.models.context import Context
from fastdiff.models.prepacked import apply, convolve, takes
from fastdiff.models.rewrites import Rewrites


class Norm(Protocol):
    """silu(group_norm(x) * weight + bias), without the silu where that is False: `GroupNormSiLU`, or an `AdaNorm`."""

    groups: int
    eps: float
    silu: bool

    @property
    def weight(self) -> Tensor | None: ...

    @property
    def bias(self) -> Tensor | None: ...


class Sum:
    """a + b of two maps, made where it is first read: by a norm, which writes it while it reads a and b, or by itself.

    By itself is what is left where a convolution reads it, or a norm that reads a stored map beside it, since a norm
    reads two maps and not three. On the CPU the product that makes b has added a already, and there is no `Sum`.
    A block that ends with a residual sum gives one of these. Whoever stores it as well sees the sum that the next
    block's norm has made.
    """

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self._terms: tuple[Tensor, Tensor] | None = (a, b)
        self._total = a

    def total(self) -> Tensor:
        if self._terms is not None:
            self._total, self._terms = self._terms[0] + self._terms[1], None
        return self._total

    def normed(self, norm: Norm, *, keep: bool) -> Tensor:
        if self._terms is None or self._terms[0].dtype != self._terms[1].dtype:
            # Of two dtypes the addition chooses one.
            return _fused(norm, self.total())
        a, b = self._terms
        if not keep:
            return _fused(norm, a, residual=b)
        y, self._total = _fused(norm, a, residual=b, return_sum=True)
        self._terms = None
        return y


Map = Tensor | Sum


def total(x: Map) -> Tensor:
    """The map as a tensor."""
    return x.total() if isinstance(x, Sum) else x


def normed(
    norm: Norm,
    x: Map,
    context: Context,
    *,
    addend: Tensor | None = None,
    second: Tensor | None = None,
    keep: bool = True,
) -> Tensor:
    """norm(x + addend[n, c]), or norm of x and `second` as if concatenated along the channels.

    keep: whether `total(x)` is read afterwards, so that a norm that makes the sum writes it too.
    """
    if not context.rewrites.group_norm_silu:
        # PyTorch's norm reads one tensor.
        h = total(x) if second is None else torch.cat([total(x), second], dim=1)
        h = h if addend is None else h + addend[:, :, None, None]
        y = torch.group_norm(h, norm.groups, norm.weight, norm.bias, norm.eps)
        return F.silu(y) if norm.silu else y
    if isinstance(x, Sum) and addend is None and second is None:
        return x.normed(norm, keep=keep)
    return _fused(norm, total(x), addend=addend, second=second)


def summed(a: Tensor, b: Tensor, scale: float, context: Context) -> Map:
    """(a + b) / scale, left to the next norm where there is no division."""
    return Sum(a, b) if folds(scale, context) else scaled(a + b, scale, context)


def folds(scale: float, context: Context) -> bool:
    """Whether the sum at a block's end is made by what writes or what reads it."""
    return context.rewrites.folded_residual and context.rewrites.unit_scale and scale == 1.0


def convolved_onto(x: Tensor, conv: nn.Module, h: Tensor, scale: float, context: Context) -> Map:
    """(x + conv(h)) / scale: added by the convolution as it writes its result, else left to the next norm."""
    if folds(scale, context) and takes((conv,), h, context.packs) and x.dtype == h.dtype:
        return convolve(conv, h, context.packs, addend=x)
    return summed(x, apply(conv, h, context.packs), scale, context)


def laid_out(x: Tensor, rewrites: Rewrites) -> Tensor:
    """x (N, C, H, W) channels-last where the rewrite of that name is on."""
    if not rewrites.channels_last:
        return x
    if x.is_contiguous():
        # One channel, and one pixel, lie either way; what is made of them lies as their strides say, which this sets.
        return x.clone(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last)


def scaled(x: Tensor, scale: float, context: Context) -> Tensor:
    """x / scale, which for a scale of 1 is x."""
    return x if scale == 1.0 and context.rewrites.unit_scale else x / scale


def settled(*tensors: Tensor) -> bool:
    """Whether what is made of these tensors may stand in for a layer: not while gradients are recorded, a graph is
    compiled, or autocast chooses the dtypes."""
    recorded = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not (recorded or torch.compiler.is_compiling() or torch.is_autocast_enabled(tensors[0].device.type))


def _fused(norm: Norm, x: Tensor, **more: Any) -> Any:
    return ops.group_norm_silu(x, norm.groups, norm.weight, norm.bias, eps=norm.eps, silu=norm.silu, **more)
