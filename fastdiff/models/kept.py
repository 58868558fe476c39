"""What networks keep besides their parameters, counted for the report."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from fastdiff.models.caches import Cache
from fastdiff.models.packs import Packed
from fastdiff.models.tracing import tensors

__all__ = ["Own", "caches", "copies"]


def caches(modules: Iterable[nn.Module]) -> Iterator[Cache]:
    """What these modules remember."""
    for module in modules:
        yield from (value for value in vars(module).values() if isinstance(value, Cache))


def copies(modules: Iterable[nn.Module], parameters: Iterable[Tensor]) -> int:
    """Bytes of the tensors that the modules' caches hold and that are not the parameters themselves."""
    seen = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = [value for cache in caches(modules) for value in cache.values()]
    total = sum(value.nbytes for value in kept if isinstance(value, Packed))
    for tensor in tensors(kept):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


class Own:
    """A network of ours that a caller has accelerated, as the report names it."""

    def __init__(self, name: str, network: nn.Module) -> None:
        self.name, self._network = name, weakref.ref(network)

    def copies(self) -> int:
        network = self._network()
        return 0 if network is None else copies(list(network.modules()), network.parameters())
