"""One weight as the CPU's products read it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.arena import outside
from fastdiff.ops import native

__all__ = ["Packed", "extension_or_none"]

_MOST_SHAPES = 64
_UNTRIMMED = 2**21
"""Bytes of copies after whose making the memory that it took goes back to the system."""


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
        _trim_after(made.numel() * made.element_size())
        if packed is not None and len(shapes) < _MOST_SHAPES and _layout(made) == _layout(packed):
            self._state = packed, shapes | {shape}
            return packed
        self._state = made, frozenset({shape})
        return made

    @property
    def nbytes(self) -> int:
        packed = self._state[0]
        if packed is None:
            return 0
        return int(torch.ops.mkldnn._nbytes(packed)) if packed.is_mkldnn else packed.nbytes


def extension_or_none() -> Any:
    """The compiled extension, or None."""
    found = native.extension()
    return None if isinstance(found, str) else found


_untrimmed = 0


def _trim_after(size: int) -> None:
    """What is freed between copies that stay is given back now and then, so that it does not add to the peak."""
    global _untrimmed
    _untrimmed += size
    if _untrimmed >= _UNTRIMMED:
        _untrimmed = 0
        extension = extension_or_none()
        if extension is not None:
            extension.trim_memory()


def _layout(packed: Tensor) -> bytes:
    return bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).tolist())
