"""Products on the CPU with weights that were laid out for them once, instead of at every call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.models.packs import PAIRED, Known, Packed, Packs, extension, widens
from fastdiff.models.processor import this
from fastdiff.models.winograd import filters, tile
from fastdiff.ops import fold_upsample

__all__ = ["apply", "convolve", "convolve_both", "convolve_doubled", "doubles", "products", "takes"]

_FOLDED = 16
"""Outputs whose weights are folded at a time."""
_PIXELS = ((1, 1), (1, 1), (0, 0), (1, 1), 1)
"""Taps, stride, padding, dilation and groups of a convolution that looks at single pixels."""
_PHASES = ((2, 2), (1, 1), (1, 1), (1, 1), 1)
"""The same of the convolution that gives the four phases of an upsampled map."""


def takes(leaves: tuple[nn.Module, ...], x: Tensor, packs: Packs | None, *, second: Tensor | None = None) -> bool:
    """Whether x, with `second` for the last channels, is multiplied with weights of these layers laid out for it."""
    return packs is not None and packs.known(leaves, x, second) is not None


def convolve(
    conv: nn.Module, x: Tensor, packs: Packs | None, *, bias: bool = True, addend: Tensor | None = None
) -> Tensor:
    """conv(x) + addend, or without the layer's bias; addend has the shape of the result and is added in float32."""
    known = packs.known((conv,), x) if packs is not None and _addable(addend, x) else None
    if packs is None or known is None:
        y = conv(x) if bias else F.conv2d(x, cast(Tensor, conv.weight), None, *_geometry(conv)[1:])
        return y if addend is None else addend + y
    # Asking the module takes longer, by as much as the rest of this.
    weight: Any = conv._parameters["weight"]
    own_bias = conv._parameters["bias"] if bias else None
    return _convolve(weight, own_bias, lambda: weight, x, _geometry(conv), packs, known, addend=addend)


def _addable(addend: Tensor | None, x: Tensor) -> bool:
    """Whether our products of x can add it: it has x's dtype, and no gradient is asked for."""
    if addend is None:
        return True
    return addend.dtype == x.dtype and not (addend.requires_grad and torch.is_grad_enabled())


def convolve_doubled(conv: nn.Conv2d, x: Tensor, packs: Packs, *, bias: bool) -> Tensor:
    """The 3x3 convolution conv of x at twice its size, as `fastdiff.ops.upsample_conv`; for what `doubles` allows."""
    geometry, known = _geometry(conv), cast(Known, packs.known((conv,), x, always=True))
    if _in_tiles(x, len(conv.weight), geometry, packs, doubled=True):
        plain_bias = conv.bias if bias else None
        return _convolve(conv.weight, plain_bias, lambda: conv.weight, x, geometry, packs, known, doubled=True)
    own_bias = None
    if bias and conv.bias is not None:
        own_bias = packs.kept(known, "four biases", (conv.bias,), lambda: cast(Tensor, conv.bias).detach().repeat(4))
    phases = _convolve(conv.weight, own_bias, lambda: _folded(conv.weight), x, _PHASES, packs, known)
    doubled: Tensor = extension().interleave(phases)
    return doubled


def _folded(weight: Tensor) -> Tensor:
    """`fold_upsample` of some outputs at a time: in float64 all would take eight times the weight's memory."""
    parts = [fold_upsample(part).unflatten(0, (4, -1)) for part in weight.split(_FOLDED)]
    return torch.cat(parts, dim=1).flatten(0, 1)


def doubles(conv: nn.Conv2d, x: Tensor, packs: Packs | None) -> bool:
    # Without a copy of its own that layer would have one of another kind, which is as large.
    return packs is not None and extension() is not None and packs.known((conv,), x, always=True) is not None


def _convolve(
    weight: Tensor,
    bias: Tensor | None,
    make: Callable[[], Tensor],
    x: Tensor,
    geometry: tuple[Any, ...],
    packs: Packs,
    known: Known,
    *,
    addend: Tensor | None = None,
    part: int = 0,
    doubled: bool = False,
) -> Tensor:
    """The convolution of x with what `make` makes of `weight`; geometry: taps, stride, padding, dilation, groups.

    doubled: of x at twice its size, for what `tile` finds tiles for.
    """
    taps, stride, padding, dilation, groups = geometry
    held: Packed = packs.kept(known, (geometry, part), (weight,), Packed)
    compiled, own_outputs = extension(), weight.shape[0]
    outputs = own_outputs * (4 if geometry is _PHASES else 1)
    if widens(x.dtype):
        packed = held.at(None, lambda: compiled.pack_weight(make().detach()))
        size = tile(x.shape, outputs, geometry, doubled=doubled) if packs.winograd else 0
        if size:
            filtered: Tensor = compiled.winograd(x, packed, bias, addend, outputs, padding, size, doubled)
            return filtered
        y: Tensor = compiled.convolve(x, packed, bias, addend, outputs, taps, stride, padding)
        return y
    if _in_tiles(x, own_outputs, geometry, packs, doubled=doubled):
        packed = held.at(PAIRED, lambda: compiled.pack_bfloat16(make().detach()))
        rounded: Tensor = compiled.winograd_bfloat16(x, packed, bias, addend, own_outputs, padding, doubled)
        return rounded
    if held.takes_pairs(x, x.numel() * outputs * taps[0] * taps[1] // (stride[0] * stride[1])):
        packed = held.at(PAIRED, lambda: compiled.pack_bfloat16(make().detach()))
        product: Tensor = compiled.convolve_bfloat16(x, packed, bias, addend, outputs, taps, stride, padding)
        return product
    shape = tuple(x.shape)
    packed = held.at(
        shape,
        lambda: torch.ops.mkldnn._reorder_convolution_weight(
            make().detach(), padding, stride, dilation, groups, list(shape)
        ),
    )
    run = torch.ops.mkldnn._convolution_pointwise
    if addend is None:
        return run(x, packed, bias, padding, stride, dilation, groups, "none", [], "")
    return run.binary(x, addend, packed, bias, padding, stride, dilation, groups, "add", None, None, [], None)


def _in_tiles(x: Tensor, outputs: int, geometry: tuple[Any, ...], packs: Packs, *, doubled: bool = False) -> bool:
    """Whether the convolution is made by Winograd's filtering."""
    if not packs.winograd:
        return False
    if widens(x.dtype):
        return tile(x.shape, outputs, geometry, doubled=doubled) > 0
    return x.dtype == torch.bfloat16 and this().filtered and filters(x.shape, outputs, geometry, doubled=doubled)


def convolve_both(conv: nn.Module, x: Tensor, second: Tensor, packs: Packs) -> Tensor:
    """conv of x and `second` as if concatenated along the channels: one product where pairs are multiplied, else the
    sum of a product each."""
    weight, bias, channels = cast(Tensor, conv.weight), cast(Tensor | None, conv.bias), x.shape[1]
    geometry, known = _geometry(conv), cast(Known, packs.known((conv,), x, second))
    if geometry == _PIXELS and x.dtype == torch.bfloat16 and this().filtered:
        held, compiled = packs.kept(known, (geometry, "both"), (weight,), Packed), extension()
        packed = held.at(PAIRED, lambda: compiled.pack_bfloat16(weight.detach()))
        product: Tensor = compiled.convolve_both_bfloat16(x, second, packed, bias, len(weight))
        return product
    y = _convolve(weight, bias, lambda: weight[:, :channels], x, geometry, packs, known, part=1)
    return _convolve(weight, None, lambda: weight[:, channels:], second, geometry, packs, known, part=2, addend=y)


def apply(leaf: nn.Module, x: Tensor, packs: Packs | None) -> Tensor:
    """leaf(x)."""
    if type(leaf) is nn.Conv2d:
        return convolve(leaf, x, packs)
    return products((leaf,), x, packs) if packs is not None and takes((leaf,), x, packs) else leaf(x)


def products(leaves: tuple[nn.Module, ...], x: Tensor, packs: Packs, *, addend: Tensor | None = None) -> Tensor:
    """[W_1; W_2; ...] x + [b_1; b_2; ...] + addend along the last dimension of x, for layers that `takes` takes.

    A 1x1 convolution counts as the linear layer that it is. addend: of the result's shape and dtype, added in float32.
    """
    known = cast(Known, packs.known(leaves, x))
    weights: list[Any] = [leaf._parameters["weight"] for leaf in leaves]
    biases: list[Any] = [leaf._parameters["bias"] for leaf in leaves]
    bias = biases[0]
    if bias is not None and len(leaves) > 1:
        bias = packs.kept(known, "bias", biases, lambda: torch.cat(biases).detach())
    held: Packed = packs.kept(known, "linear", weights, Packed)
    compiled = extension()
    outputs = sum(weight.shape[0] for weight in weights)
    if widens(x.dtype):
        packed = held.at(None, lambda: compiled.pack_weight(_joined(weights)))
        return _product(compiled.multiply, compiled.convolve, x, packed, bias, outputs, addend)
    rows = x.numel() // x.shape[-1]
    if held.takes_pairs(x, x.numel() * outputs):
        packed = held.at(PAIRED, lambda: compiled.pack_bfloat16(_joined(weights)))
        return _product(compiled.multiply_bfloat16, compiled.convolve_bfloat16, x, packed, bias, outputs, addend)
    packed = held.at(rows, lambda: torch.ops.mkldnn._reorder_linear_weight(_joined(weights), rows))
    if addend is None:
        return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return torch.ops.mkldnn._linear_pointwise.binary(x, addend.contiguous(), packed, bias, "add")


def _product(
    multiply: Callable[..., Tensor],
    convolution: Callable[..., Tensor],
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    outputs: int,
    addend: Tensor | None,
) -> Tensor:
    """The product, or with an addend the 1x1 convolution that it is."""
    if addend is None:
        return multiply(x, packed, bias, outputs)
    y = convolution(_as_map(x), packed, bias, _as_map(addend), outputs, (1, 1), (1, 1), (0, 0))
    return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], outputs)


def _as_map(tokens: Tensor) -> Tensor:
    """(..., C) -> (1, C, 1, all the rest), channels-last."""
    return tokens.reshape(1, 1, -1, tokens.shape[-1]).permute(0, 3, 1, 2)


def _joined(weights: Sequence[Tensor]) -> Tensor:
    flat = [weight.detach().flatten(1) for weight in weights]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _geometry(conv: nn.Module) -> tuple[Any, ...]:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
