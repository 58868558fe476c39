"""What a network keeps of its layers' weights, laid out as the products on the CPU read them."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fastdiff.models.arena import outside
from fastdiff.models.caches import Cache
from fastdiff.models.leaf import is_plain
from fastdiff.models.processor import extension, this
from fastdiff.models.rewrites import Rewrites
from fastdiff.ops.torch_library import onednn_dtypes

__all__ = ["PAIRED", "Known", "Packed", "Packs", "extension", "widens"]

_MOST_SHAPES = 64
_MARGIN = 2**20
"""Bytes of copies beyond those of the parameters, since what is laid out is filled up to whole vectors."""
_UNTRIMMED = 2**21
"""Bytes of copies after whose making the memory that it took goes back to the system."""
PAIRED = "paired"
"""The layout of a weight of bfloat16 for products of ours of any shape: channels in pairs."""


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
        self._known: dict[tuple[int, ...], Known] = {}

    def ready(self, x: Tensor, rewrites: Rewrites, network: nn.Module) -> Packs | None:
        """Itself where a call of the network with x may use it: none where what happens is compiled, traced,
        transformed or observed, or where autocast chooses the dtypes."""
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
        self._room = self._elements * x.element_size() + _MARGIN
        return self

    def known(
        self, leaves: tuple[nn.Module, ...], x: Tensor, second: Tensor | None = None, *, always: bool = False
    ) -> Known | None:
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
            found = self._known[place] = Known(leaves, x, fits=fits)
        return found if found.fits or always else None

    def kept(self, known: Known, key: Hashable, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Any:
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


class Known:
    """Layers as they were when first looked at, and what was made of their parameters since; that lives elsewhere.

    fits: whether there was room for a copy of their weights.
    """

    def __init__(self, leaves: tuple[nn.Module, ...], x: Tensor, *, fits: bool) -> None:
        compiled = extension()
        self.fits = fits
        self.values: dict[Hashable, weakref.ref[Any]] = {}
        self.layers: Any = None
        if compiled is not None:
            flat = any(cast(Tensor, leaf.weight).dim() != 4 for leaf in leaves)
            self.layers = compiled.Layers(leaves, x, cast(Tensor, leaves[0].weight).shape[1], flat)


class Packed:
    """A weight as it is read: ours for what is multiplied in float32, otherwise in the layout that oneDNN chooses for
    the shape of what it is multiplied with. There is one copy: where a new shape asks for another layout, that one
    takes its place."""

    def __init__(self) -> None:
        self._state: tuple[Tensor | None, frozenset[Any]] = (None, frozenset())

    def at(self, shape: Any, pack: Callable[[], Tensor]) -> Tensor:
        """For this shape; pack: makes it."""
        packed, shapes = self._state
        if packed is not None and shape in shapes:
            return packed
        with outside():
            made = pack()
        _trim_after(made.numel() * made.element_size())
        kept = packed is not None and packed.is_mkldnn and made.is_mkldnn and _layout(made) == _layout(packed)
        if packed is not None and kept and len(shapes) < _MOST_SHAPES:
            self._state = packed, shapes | {shape}
            return packed
        self._state = made, frozenset({shape})
        return made

    def takes_pairs(self, x: Tensor, products: int) -> bool:
        """Whether ours are these products of x. A weight stays in the layout that it was given first, or in oneDNN's
        once that was needed where ours serve for small products only."""
        own = this()
        if x.dtype != torch.bfloat16 or own.most == 0:
            return False
        if self._state[0] is None:
            return products <= own.most
        return PAIRED in self._state[1] and (own.filtered or products <= own.most)

    @property
    def nbytes(self) -> int:
        packed = self._state[0]
        if packed is None:
            return 0
        return int(torch.ops.mkldnn._nbytes(packed)) if packed.is_mkldnn else packed.nbytes


_untrimmed = 0


def _trim_after(size: int) -> None:
    """What is freed between copies that stay is given back now and then, so that it does not add to the peak."""
    global _untrimmed
    _untrimmed += size
    if _untrimmed >= _UNTRIMMED:
        _untrimmed = 0
        compiled = extension()
        if compiled is not None:
            compiled.trim_memory()


def widens(dtype: torch.dtype) -> bool:
    """Whether products of this dtype are ours and made in float32."""
    if dtype == torch.float32:
        return extension() is not None
    return dtype == torch.bfloat16 and this().widened


def _fits(x: Tensor) -> bool:
    if type(x) is not Tensor or x.numel() == 0 or not torch.backends.mkldnn.enabled:
        return False
    if x.dtype not in onednn_dtypes() and not widens(x.dtype):
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
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())
