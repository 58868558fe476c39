"""Memory of the CPU that a network's calls hand on to each other, instead of taking it from the system each time."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any

from fastdiff.errors import InputError
from fastdiff.ops import native

__all__ = ["Arena"]


class Arena:
    """Inside `with arena:` this thread's CPU tensors come from blocks that were freed before, of nearly the same size.

    So a network that is called again with the same shapes takes nothing from the system, whose new pages cost more than
    most layers compute. Blocks are aligned to 64 bytes and up to an eighth larger than asked for. oneDNN's scratchpads
    come from here too, as far as PyTorch provides them. What other threads allocate does not, those of PyTorch's
    parallel loops among them; and nothing outside the CPU does.

    Any number of threads may be inside one arena, and a tensor may be freed anywhere and at any time: also after the
    scope, and after the arena. Blocks in use belong to their tensors; `limit` bounds the bytes of those that lie idle,
    of which the ones idle for longest go back to the system first: a quarter of the machine's memory unless given. All
    idle ones go back with the arena.

    Without the compiled extension a scope changes nothing, and the counters stay 0.
    Errors: InputError for a negative limit.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and limit < 0:
            raise InputError(f"Arena: limit is {limit}; expected bytes, at least 0, or None")
        extension = native.extension()
        self._limit = limit
        self._pool: Any = None
        if not isinstance(extension, str):
            self._pool = extension.Arena(_quarter_of_memory() if limit is None else limit)

    def __enter__(self) -> Arena:
        if self._pool is not None:
            self._pool.enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.leave()

    def __reduce__(self) -> tuple[type[Arena], tuple[int | None]]:
        """A copy, also in another process, is an arena of its own."""
        return Arena, (self._limit,)

    @property
    def bytes(self) -> int:
        """Held now, in use and idle."""
        return self._counter("bytes")

    @property
    def idle(self) -> int:
        """Bytes held for what comes next."""
        return self._counter("idle")

    @property
    def hits(self) -> int:
        """Allocations that were handed a block from here."""
        return self._counter("hits")

    @property
    def misses(self) -> int:
        """Allocations for which a block was taken from the system."""
        return self._counter("misses")

    def clear(self) -> None:
        """Give every idle block back to the system."""
        if self._pool is not None:
            self._pool.clear()

    def _counter(self, name: str) -> int:
        return 0 if self._pool is None else int(getattr(self._pool, name))


def _quarter_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
