"""Products on the CPU with weights that were laid out for them once, instead of at every call."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastdiff.models.caches import Cache
from fastdiff.models.leaf import is_plain
from fastdiff.models.packed import Packed, extension_or_none
from fastdiff.models.rewrites import Rewrites
from fastdiff.models.winograd import tile
from fastdiff.ops import fold_upsample

__all__ = ["Packs", "apply", "convolve", "convolve_both", "convolve_doubled", "doubles", "products", "takes"]

_LEAST_ROOM = 2**22
"""Bytes of copies that every network may have."""
_PHASES = ((2, 2), (1, 1), (1, 1), (1, 1), 1)
"""Taps, stride, padding, dilation and groups of the convolution that gives the four phases of an upsampled map."""


class Packs(Cache):
    """The weights of a network's layers as the products read them, one copy of each, made at the layer's first call.

    A weight that is another object, was written to or got other storage is laid out anew. All copies together are as
    large as the network's parameters, as long as that is enough for the layers that have to have one: the layers that
    come last, when nothing is left, are run on the parameters themselves.
    """

    def __init__(self, size: int = sys.maxsize) -> None:
        super().__init__(size)
        self._elements: int | None = None
        self._room = sys.maxsize
        self._known: dict[tuple[int, ...], _Known] = {}

    def ready(self, x: Tensor, network: nn.Module) -> Packs | None:
        """Itself where a call of the network with x may use it: none where what happens is compiled, traced,
        transformed or observed, or where autocast chooses the dtypes."""
        rewrites = cast(Rewrites, network.rewrites)
        if torch.compiler.is_compiling() or not rewrites.prepacked or type(x) is not Tensor or not x.is_cpu:
            return None
        watched = (
            _get_current_dispatch_mode() is not None
            or torch.jit.is_tracing()
            or torch._C._functorch.peek_interpreter_stack() is not None
        )
        if watched or torch.is_autocast_enabled("cpu"):
            return None
        if self._elements is None:
            self._elements = sum(parameter.numel() for parameter in network.parameters())
        self._room = max(self._elements * x.element_size(), _LEAST_ROOM)
        return self

    def known(
        self, leaves: tuple[nn.Module, ...], x: Tensor, second: Tensor | None = None, *, always: bool = False
    ) -> _Known | None:
        """What is remembered of these layers if x, with `second` for the last channels, fits them, else None; also
        where there is no room for a copy of their weights, unless that has to be `always`."""
        place = (*map(id, leaves),)
        found = self._known.get(place)
        if found is None or found.layers is None or not found.layers.fit(leaves, x, second):
            if not ((second is None or _fits(second)) and _takes(leaves, x, second)):
                return None
            weights = [cast(Tensor, leaf.weight) for leaf in leaves]
            used = sum(value.nbytes for value in self.others(weights) if isinstance(value, Packed))
            fits = used + sum(weight.nbytes for weight in weights) <= self._room
            found = self._known[place] = _Known(leaves, x, fits=fits)
        return found if found.fits or always else None

    def kept(self, known: _Known, key: Hashable, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        """As `get`, for parameters of layers that have not changed since they became known."""
        reference = known.values.get(key)
        value = None if reference is None else reference()
        if value is None:
            value = self.get(key, tensors, make)
            known.values[key] = weakref.ref(value)
        return value

    def clear(self) -> None:
        super().clear()
        self._known.clear()


class _Known:
    """Layers as they were when first looked at, and what was made of their parameters since; that lives elsewhere.

    fits: whether there was room for a copy of their weights.
    """

    def __init__(self, leaves: tuple[nn.Module, ...], x: Tensor, *, fits: bool) -> None:
        extension = extension_or_none()
        self.fits = fits
        self.values: dict[Hashable, weakref.ref[Any]] = {}
        self.layers: Any = None
        if extension is not None:
            flat = any(cast(Tensor, leaf.weight).dim() != 4 for leaf in leaves)
            self.layers = extension.Layers(leaves, x, cast(Tensor, leaves[0].weight).shape[1], flat)


def takes(leaves: tuple[nn.Module, ...], x: Tensor, packs: Packs | None, *, second: Tensor | None = None) -> bool:
    """Whether x, with `second` for the last channels, is multiplied with weights of these layers laid out for it."""
    return packs is not None and packs.known(leaves, x, second) is not None


def convolve(
    conv: nn.Module, x: Tensor, packs: Packs | None, *, bias: bool = True, addend: Tensor | None = None
) -> Tensor:
    """conv(x) + addend, or without the layer's bias; addend has the shape of the result and is added in float32."""
    known = None if packs is None else packs.known((conv,), x)
    if packs is None or known is None:
        y = conv(x) if bias else F.conv2d(x, cast(Tensor, conv.weight), None, *_geometry(conv)[1:])
        return y if addend is None else addend + y
    weight, own_bias = cast(Tensor, conv.weight), cast(Tensor | None, conv.bias) if bias else None
    return _convolve(weight, own_bias, lambda: weight, x, _geometry(conv), packs, known, addend=addend)


def convolve_doubled(conv: nn.Conv2d, x: Tensor, packs: Packs, *, bias: bool) -> Tensor:
    """The 3x3 convolution conv of x at twice its size, as `fastdiff.ops.upsample_conv`; for what `doubles` allows."""
    known = cast(_Known, packs.known((conv,), x, always=True))
    if x.dtype == torch.float32 and tile(x.shape, len(conv.weight), _geometry(conv), doubled=True):
        plain_bias = conv.bias if bias else None
        return _convolve(conv.weight, plain_bias, lambda: conv.weight, x, _geometry(conv), packs, known, doubled=True)
    own_bias = None
    if bias and conv.bias is not None:
        own_bias = packs.kept(known, "four biases", (conv.bias,), lambda: cast(Tensor, conv.bias).detach().repeat(4))
    phases = _convolve(conv.weight, own_bias, lambda: fold_upsample(conv.weight), x, _PHASES, packs, known)
    doubled: Tensor = extension_or_none().interleave(phases)
    return doubled


def doubles(conv: nn.Conv2d, x: Tensor, packs: Packs | None) -> bool:
    # Without a copy of its own that layer would have one of another kind, which is as large.
    return packs is not None and extension_or_none() is not None and packs.known((conv,), x, always=True) is not None


def _convolve(
    weight: Tensor,
    bias: Tensor | None,
    make: Callable[[], Tensor],
    x: Tensor,
    geometry: tuple[Any, ...],
    packs: Packs,
    known: _Known,
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
    extension = extension_or_none()
    if x.dtype == torch.float32 and extension is not None:
        packed = held.at(None, lambda: extension.pack_weight(make().detach()))
        outputs = len(weight) * (4 if geometry is _PHASES else 1)
        size = tile(x.shape, outputs, geometry, doubled=doubled)
        if size:
            filtered: Tensor = extension.winograd(x, packed, bias, addend, outputs, padding, size, doubled)
            return filtered
        y: Tensor = extension.convolve(x, packed, bias, addend, outputs, taps, stride, padding)
        return y
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


def convolve_both(conv: nn.Module, x: Tensor, second: Tensor, packs: Packs) -> Tensor:
    """conv of x and `second` as if concatenated along the channels: the sum of a product each."""
    weight, bias, channels = cast(Tensor, conv.weight), cast(Tensor | None, conv.bias), x.shape[1]
    geometry, known = _geometry(conv), cast(_Known, packs.known((conv,), x, second))
    y = _convolve(weight, bias, lambda: weight[:, :channels], x, geometry, packs, known, part=1)
    return _convolve(weight, None, lambda: weight[:, channels:], second, geometry, packs, known, part=2, addend=y)


def apply(leaf: nn.Module, x: Tensor, packs: Packs | None) -> Tensor:
    """leaf(x)."""
    if type(leaf) is nn.Conv2d:
        return convolve(leaf, x, packs)
    return products((leaf,), x, packs) if packs is not None and takes((leaf,), x, packs) else leaf(x)


def products(leaves: tuple[nn.Module, ...], x: Tensor, packs: Packs) -> Tensor:
    """[W_1; W_2; ...] x + [b_1; b_2; ...] along the last dimension of x, for layers that `takes` takes.

    A 1x1 convolution counts as the linear layer that it is.
    """
    known = cast(_Known, packs.known(leaves, x))
    weights: list[Any] = [leaf._parameters["weight"] for leaf in leaves]
    biases: list[Any] = [leaf._parameters["bias"] for leaf in leaves]
    bias = biases[0]
    if bias is not None and len(leaves) > 1:
        bias = packs.kept(known, "bias", biases, lambda: torch.cat(biases).detach())
    held: Packed = packs.kept(known, "linear", weights, Packed)
    extension = extension_or_none()
    if x.dtype == torch.float32 and extension is not None:
        packed = held.at(None, lambda: extension.pack_weight(_joined(weights)))
        y: Tensor = extension.multiply(x, packed, bias, sum(weight.shape[0] for weight in weights))
        return y
    rows = x.numel() // x.shape[-1]
    packed = held.at(rows, lambda: torch.ops.mkldnn._reorder_linear_weight(_joined(weights), rows))
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


def _joined(weights: Sequence[Tensor]) -> Tensor:
    flat = [weight.detach().flatten(1) for weight in weights]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _geometry(conv: nn.Module) -> tuple[Any, ...]:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups


@cache
def _dtypes() -> frozenset[torch.dtype]:
    """What oneDNN multiplies on this machine."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    found = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found.add(torch.bfloat16)
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        found.add(torch.float16)
    return frozenset(found)


def _fits(x: Tensor) -> bool:
    if type(x) is not Tensor or x.dtype not in _dtypes() or x.numel() == 0 or not torch.backends.mkldnn.enabled:
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
