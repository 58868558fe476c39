"""Products on the CPU with weights that were laid out for them once, instead of at every call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastdiff.models.arena import outside
from fastdiff.models.caches import Cache
from fastdiff.models.leaf import is_plain
from fastdiff.models.rewrites import Rewrites
from fastdiff.models.winograd import filters, tile
from fastdiff.ops import fold_upsample, native
from fastdiff.ops.torch_library import onednn_dtypes

__all__ = ["Packs", "apply", "convolve", "convolve_both", "convolve_doubled", "doubles", "products", "takes"]

_MOST_SHAPES = 64
_PHASES = ((2, 2), (1, 1), (1, 1), (1, 1), 1)
"""Taps, stride, padding, dilation and groups of the convolution that gives the four phases of an upsampled map."""


_FILTERED, _PAIRED = "filtered", "paired"
"""The layouts of a weight of bfloat16 that was transformed, and of one whose channels lie in pairs: for any shape."""
_MOST_PRODUCTS = 2**27
"""Up to so many products of bfloat16 ours are faster than oneDNN's, which take 20 microseconds to begin."""


class Packs(Cache):
    """The weights of a network's layers as the products read them, one copy of each, made at the layer's first call.

    A weight that is another object, was written to or got other storage is laid out anew.
    """

    def __init__(self, size: int = sys.maxsize) -> None:
        super().__init__(size)

    def ready(self, x: Tensor, rewrites: Rewrites) -> Packs | None:
        """Itself where a call with x may use it: none where what happens is compiled, traced, transformed or observed,
        or where autocast chooses the dtypes."""
        if torch.compiler.is_compiling() or not rewrites.prepacked or type(x) is not Tensor or not x.is_cpu:
            return None
        watched = (
            _get_current_dispatch_mode() is not None
            or torch.jit.is_tracing()
            or torch._C._functorch.peek_interpreter_stack() is not None
        )
        return None if watched or torch.is_autocast_enabled("cpu") else self


class Packed:
    """A weight as it is read: ours for float32, otherwise in the layout that oneDNN chooses for the shape of what it is
    multiplied with. There is one copy: where a new shape asks for another layout, that one takes its place."""

    def __init__(self) -> None:
        self._state: tuple[Tensor | None, frozenset[Any]] = (None, frozenset())

    def at(self, shape: Any, pack: Callable[[], Tensor]) -> Tensor:
        """For this shape; pack: makes it."""
        packed, shapes = self._state
        if packed is not None and shape in shapes:
            return packed
        with outside():
            made = pack()
        if packed is not None and len(shapes) < _MOST_SHAPES and _layout(made) == _layout(packed):
            self._state = packed, shapes | {shape}
            return packed
        self._state = made, frozenset({shape})
        return made

    def lies(self, layout: str) -> bool:
        """Whether it has this layout, in which it serves every shape."""
        return layout in self._state[1]

    def takes_pairs(self, x: Tensor, channels: int, products: int) -> bool:
        """Whether ours are these products of x. A weight stays in the layout that it was given first."""
        if x.dtype != torch.bfloat16 or channels % 2 or not _has_products():
            return False
        return products <= _MOST_PRODUCTS if self._state[0] is None else self.lies(_PAIRED)

    @property
    def nbytes(self) -> int:
        packed = self._state[0]
        if packed is None:
            return 0
        return int(torch.ops.mkldnn._nbytes(packed)) if packed.is_mkldnn else packed.nbytes


def takes(leaves: Sequence[nn.Module], x: Tensor, packs: Packs | None, *, second: Tensor | None = None) -> bool:
    """Whether x, with `second` for the last channels, is multiplied with weights of these layers laid out for it."""
    return packs is not None and (second is None or _fits(second)) and _takes(leaves, x, second)


def convolve(
    conv: nn.Module, x: Tensor, packs: Packs | None, *, bias: bool = True, addend: Tensor | None = None
) -> Tensor:
    """conv(x) + addend, or without the layer's bias; addend has the shape of the result and is added in float32."""
    if packs is None or not _takes((conv,), x):
        y = conv(x) if bias else F.conv2d(x, cast(Tensor, conv.weight), None, *_geometry(conv)[1:])
        return y if addend is None else addend + y
    weight, own_bias = cast(Tensor, conv.weight), cast(Tensor | None, conv.bias) if bias else None
    return _convolve(weight, own_bias, lambda: weight, x, _geometry(conv), packs, addend=addend)


def convolve_doubled(conv: nn.Conv2d, x: Tensor, packs: Packs, *, bias: bool) -> Tensor:
    """The 3x3 convolution conv of x at twice its size, as `fastdiff.ops.upsample_conv`; for what `doubles` allows."""
    geometry = _geometry(conv)
    if _in_tiles(x, len(conv.weight), geometry, doubled=True):
        plain_bias = conv.bias if bias else None
        return _convolve(conv.weight, plain_bias, lambda: conv.weight, x, geometry, packs, doubled=True)
    own_bias = conv.bias.repeat(4) if bias and conv.bias is not None else None
    phases = _convolve(conv.weight, own_bias, lambda: fold_upsample(conv.weight), x, _PHASES, packs)
    doubled: Tensor = _extension().interleave(phases)
    return doubled


def doubles(conv: nn.Conv2d, x: Tensor, packs: Packs | None) -> bool:
    return _extension() is not None and takes((conv,), x, packs)


def _convolve(
    weight: Tensor,
    bias: Tensor | None,
    make: Callable[[], Tensor],
    x: Tensor,
    geometry: tuple[Any, ...],
    packs: Packs,
    *,
    addend: Tensor | None = None,
    part: int = 0,
    doubled: bool = False,
) -> Tensor:
    """The convolution of x with what `make` makes of `weight`; geometry: taps, stride, padding, dilation, groups.

    doubled: of x at twice its size, for what `tile` finds tiles for.
    """
    taps, stride, padding, dilation, groups = geometry
    held: Packed = packs.get((geometry, "doubled" if doubled else part), (weight,), Packed)
    extension = _extension()
    if x.dtype == torch.float32 and extension is not None:
        packed = held.at(None, lambda: extension.pack_weight(make().detach()))
        outputs = len(weight) * (4 if geometry is _PHASES else 1)
        size = tile(x.shape, outputs, geometry, doubled=doubled)
        if size:
            filtered: Tensor = extension.winograd(x, packed, bias, addend, outputs, padding, size, doubled)
            return filtered
        y: Tensor = extension.conv_packed(x, packed, bias, addend, outputs, taps, stride, padding)
        return y
    if held.lies(_FILTERED) or _in_tiles(x, len(weight), geometry, doubled=doubled):
        packed = held.at(_FILTERED, lambda: extension.pack_winograd_bfloat16(make().detach(), doubled))
        rounded: Tensor = extension.winograd_bfloat16(x, packed, bias, addend, len(weight), padding, doubled)
        return rounded
    outputs = len(weight) * (4 if geometry is _PHASES else 1)
    if held.takes_pairs(x, x.shape[1], x.numel() * outputs * taps[0] * taps[1] // (stride[0] * stride[1])):
        packed = held.at(_PAIRED, lambda: extension.pack_bfloat16(make().detach()))
        product: Tensor = extension.convolve_bfloat16(x, packed, bias, addend, outputs, taps, stride, padding)
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


def _in_tiles(x: Tensor, outputs: int, geometry: tuple[Any, ...], *, doubled: bool = False) -> bool:
    """Whether the convolution is made by Winograd's filtering."""
    if x.dtype == torch.float32:
        return _extension() is not None and tile(x.shape, outputs, geometry, doubled=doubled) > 0
    return x.dtype == torch.bfloat16 and _has_products() and filters(x.shape, outputs, geometry, doubled=doubled)


def _has_products() -> bool:
    """Whether the machine has products of bfloat16 for ours."""
    extension = _extension()
    return extension is not None and extension.has_bfloat16_products()


def convolve_both(conv: nn.Module, x: Tensor, second: Tensor, packs: Packs) -> Tensor:
    """conv of x and `second` as if concatenated along the channels: the sum of a product each."""
    weight, geometry, channels = cast(Tensor, conv.weight), _geometry(conv), x.shape[1]
    y = _convolve(weight, conv.bias, lambda: weight[:, :channels], x, geometry, packs, part=1)  # type: ignore[arg-type]
    return _convolve(weight, None, lambda: weight[:, channels:], second, geometry, packs, part=2, addend=y)


def apply(leaf: nn.Module, x: Tensor, packs: Packs | None) -> Tensor:
    """leaf(x)."""
    if type(leaf) is nn.Conv2d:
        return convolve(leaf, x, packs)
    return products((leaf,), x, packs) if packs is not None and _takes((leaf,), x) else leaf(x)


def products(leaves: Sequence[nn.Module], x: Tensor, packs: Packs, *, addend: Tensor | None = None) -> Tensor:
    """[W_1; W_2; ...] x + [b_1; b_2; ...] + addend along the last dimension of x, for layers that `takes` takes.

    A 1x1 convolution counts as the linear layer that it is. addend: of the result's shape and dtype, added in float32.
    """
    weights = [leaf.weight for leaf in leaves]
    biases = [leaf.bias for leaf in leaves]
    bias: Any = biases[0] if len(leaves) == 1 else None
    if bias is None and biases[0] is not None:
        bias = packs.get("bias", biases, lambda: torch.cat(biases))  # type: ignore[arg-type]
    held: Packed = packs.get("linear", weights, Packed)  # type: ignore[arg-type]
    extension = _extension()
    outputs = sum(map(len, weights))  # type: ignore[arg-type]
    if x.dtype == torch.float32 and extension is not None:
        packed = held.at(None, lambda: extension.pack_weight(_joined(weights)))  # type: ignore[arg-type]
        return _product(extension.multiply, extension.conv_packed, x, packed, bias, outputs, addend)
    rows = x.numel() // x.shape[-1]
    if held.takes_pairs(x, x.shape[-1], x.numel() * outputs):
        packed = held.at(_PAIRED, lambda: extension.pack_bfloat16(_joined(weights)))  # type: ignore[arg-type]
        return _product(extension.multiply_bfloat16, extension.convolve_bfloat16, x, packed, bias, outputs, addend)
    packed = held.at(rows, lambda: torch.ops.mkldnn._reorder_linear_weight(_joined(weights), rows))  # type: ignore
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


def _extension() -> Any:
    """The compiled extension, or None."""
    found = native.extension()
    return None if isinstance(found, str) else found


def _fits(x: Tensor) -> bool:
    if type(x) is not Tensor or x.dtype not in onednn_dtypes() or x.numel() == 0 or not torch.backends.mkldnn.enabled:
        return False
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    return x.dim() == 3 or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _takes(leaves: Sequence[nn.Module], x: Tensor, second: Tensor | None = None) -> bool:
    if not _fits(x):
        return False
    channels = (x.shape[1] + (0 if second is None else second.shape[1])) if x.dim() == 4 else x.shape[-1]
    graded = torch.is_grad_enabled()
    for leaf in leaves:
        if not is_plain(leaf):
            return False
        weight, bias = cast(Tensor, leaf.weight), leaf.bias
        for own in (weight,) if bias is None else (weight, bias):
            if type(own) is not nn.Parameter or own.dtype != x.dtype or not own.is_cpu or own.is_inference():
                return False
            if graded and own.requires_grad:
                return False
        if type(leaf) is nn.Conv2d and (leaf.groups != 1 or leaf.dilation != (1, 1) or isinstance(leaf.padding, str)):
            return False
        if weight.shape[1] != channels or (x.dim() == 4) > (weight.dim() == 4):
            return False
    return True


def _layout(packed: Tensor) -> bytes:
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist()) if packed.is_mkldnn else b""
