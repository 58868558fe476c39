"""What a network remembers from one call to the next, tied to the tensors that it was made of."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastdiff.models.arena import outside
from fastdiff.ops import native

__all__ = ["Cache", "RunCache"]

_LARGEST_COPY = 2**20
"""Elements of the largest tensor without a version whose values are compared instead."""


class Cache:
    """The `size` latest results, each valid as long as its tensors are the same objects and were not written to.

    A tensor is known by its identity, which a weak reference guards, by the version that PyTorch counts up at every
    write in place, and by its place in memory, since `.to()` gives a parameter another one without counting. An address
    would not do: another tensor may come to lie there. Writes through `tensor.data` have a count of their own, at which
    everything is made anew. Not noticed is what no tensor does: writing through `numpy()` or an address, or another
    process. Tensors made in inference mode count no versions: small ones on the CPU are compared with a copy, what
    depends on others is made anew each time; so is everything while a graph is compiled. Threads may share a cache; a
    copy of one is empty.
    """

    def __init__(self, size: int = 8) -> None:
        self._size = size
        self._entries: OrderedDict[tuple[Hashable, ...], _Entry] = OrderedDict()
        self._lock = threading.Lock()
        self._watch, self._writes = native.written()

    def get(self, key: Hashable, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        """What `make` gives, remembered under `key` and these tensors."""
        if torch.compiler.is_compiling() or not all(map(_is_followed, tensors)):
            return make()
        place = (key, *map(id, tensors))
        writes = self._writes()
        with self._lock:
            found = self._entries.get(place)
            if found is not None and found.holds(writes, tensors):
                self._entries.move_to_end(place)
                return found.value
        with outside():
            versions = [_version(tensor) for tensor in tensors]
            value = make()
        for tensor in tensors:
            self._watch(tensor)
        # Making it may lay parameters side by side, which gives them another storage.
        seen = [_Seen.now(tensor, version) for tensor, version in zip(tensors, versions, strict=True)]
        with self._lock:
            for dead in [other for other, entry in self._entries.items() if entry.gone(writes)]:
                del self._entries[dead]
            self._entries[place] = _Entry(writes, seen, value)
            self._entries.move_to_end(place)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return value

    def values(self) -> list[Any]:
        """All results that are remembered, whether their tensors are still the same or not."""
        with self._lock:
            return [entry.value for entry in self._entries.values()]

    def others(self, tensors: Sequence[Tensor]) -> list[Any]:
        """The results that may be given again, but for those that were made of exactly these tensors."""
        own, writes = (*map(id, tensors),), self._writes()
        with self._lock:
            return [
                entry.value for place, entry in self._entries.items() if not entry.gone(writes) and place[1:] != own
            ]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()

    def __reduce__(self) -> tuple[type[Cache], tuple[int]]:
        return type(self), (self._size,)


class RunCache(Cache):
    """Tables over the times of a run, each tied to the tensors that it was made of."""

    def table(self, key: Hashable, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Any | None:
        """What `make` gives, from the second call with these tensors on; None at the first.

        Tensors that come once, such as labels joined anew for every step, are not worth a table of all steps.
        """
        if torch.compiler.is_compiling() or not all(map(_is_followed, tensors)):
            return None
        held = self.get(key, tensors, dict)
        if not held:
            held["seen"] = True
            return None
        if "table" not in held:
            with outside():
                held["table"] = make()
        return held["table"]


@dataclass(frozen=True)
class _Entry:
    """A result, the tensors that it was made of, and the count of other writes when that began."""

    writes: int
    seen: list[_Seen]
    value: Any

    def holds(self, writes: int, tensors: Sequence[Tensor]) -> bool:
        return self.writes == writes and all(
            seen.still(tensor) for seen, tensor in zip(self.seen, tensors, strict=True)
        )

    def gone(self, writes: int) -> bool:
        """Whether it will never hold again."""
        return self.writes != writes or any(seen.reference() is None for seen in self.seen)


@dataclass(frozen=True)
class _Seen:
    """A tensor as it was."""

    reference: weakref.ref[Tensor]
    version: int | Tensor
    storage: StorageWeakRef  # while this is held, no other storage has the same number
    place: tuple[Any, ...]

    @classmethod
    def now(cls, tensor: Tensor, version: int | Tensor) -> _Seen:
        return cls(weakref.ref(tensor), version, StorageWeakRef(tensor.untyped_storage()), _place(tensor))

    def still(self, tensor: Tensor) -> bool:
        return (
            self.reference() is tensor
            and self.storage.cdata == tensor.untyped_storage()._cdata
            and self.place == _place(tensor)
            and self._unwritten(tensor)
        )

    def _unwritten(self, tensor: Tensor) -> bool:
        if isinstance(self.version, Tensor):
            return torch.equal(self.version, tensor)
        return self.version == tensor._version


def _is_followed(tensor: Tensor) -> bool:
    """Whether it can be known if a tensor was written to."""
    if not tensor.is_inference():
        return True
    return tensor.is_cpu and type(tensor) in (Tensor, nn.Parameter) and tensor.numel() <= _LARGEST_COPY


def _version(tensor: Tensor) -> int | Tensor:
    """What changes when a tensor is written to: its values, where there is no count."""
    return tensor.detach().clone() if tensor.is_inference() else tensor._version


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where in its storage a tensor lies, which setting `tensor.data` changes."""
    return tensor.storage_offset(), tensor.stride()
