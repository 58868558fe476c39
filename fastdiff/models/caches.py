"""What a network remembers from one call to the next, tied to the tensors that it was made of."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor

__all__ = ["Cache"]


class Cache:
    """The `size` latest results, each valid as long as its tensors are the same objects and were not written to.

    A tensor is known by its identity, which a weak reference guards, and by the version that PyTorch counts up at every
    write in place. An address would not do: another tensor may come to lie there. Tensors made in inference mode count
    no versions, so that what depends on one is made anew each time. Threads may share a cache.
    """

    def __init__(self, size: int = 8) -> None:
        self._size = size
        self._entries: OrderedDict[Hashable, tuple[list[weakref.ref[Tensor]], list[int], Any]] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Any:
        """What `make` gives, remembered under `key` and these tensors."""
        if any(tensor.is_inference() for tensor in tensors):
            return make()
        versions = [tensor._version for tensor in tensors]
        place = (key, *map(id, tensors))
        with self._lock:
            found = self._entries.get(place)
            if found is not None:
                references, known, value = found
                same = all(reference() is tensor for reference, tensor in zip(references, tensors, strict=True))
                if same and known == versions:
                    self._entries.move_to_end(place)
                    return value
        value = make()
        with self._lock:
            self._entries[place] = ([weakref.ref(tensor) for tensor in tensors], versions, value)
            self._entries.move_to_end(place)
            while len(self._entries) > self._size:
                self._entries.popitem(last=False)
        return value

    def values(self) -> list[Any]:
        """All results that are remembered, whether their tensors are still the same or not."""
        with self._lock:
            return [value for _, _, value in self._entries.values()]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
