"""Memory of the CPU that a network's calls hand on to each other, instead of taking it from the system each time."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError
from fastdiff.ops import native

__all__ = ["Arena", "Lease", "in_arena", "outside", "release", "shared"]

P = ParamSpec("P")
Result = TypeVar("Result")


class Arena:
    """Inside `with arena:` this thread's CPU tensors come from one stretch of memory, which is kept for the next scope.

    So a network that is called again with the same shapes takes nothing from the system, whose new pages cost more than
    most layers compute. A tensor lies in the first gap that it fits, aligned to 64 bytes, so that the arena is hardly
    larger than what was in use at a time. oneDNN's scratchpads come from here too, as far as PyTorch provides them.
    What other threads allocate does not, those of parallel loops among them, and nothing outside the CPU does.

    Any number of threads may be inside one arena, and a tensor may be freed anywhere and at any time: also after the
    scope, and after the arena. When nobody is inside, pages that none of the last eight scopes has reached go back to
    the system, and so do those of more than `limit` idle bytes: a quarter of the machine's memory unless given. All
    that is not in use goes back with the arena.

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
        """Allocations in memory that was held before."""
        return self._counter("hits")

    @property
    def misses(self) -> int:
        """Allocations for which memory was taken from the system."""
        return self._counter("misses")

    def clear(self) -> None:
        """Give all that is not in use back to the system."""
        if self._pool is not None:
            self._pool.clear()

    def _counter(self, name: str) -> int:
        return 0 if self._pool is None else int(getattr(self._pool, name))


@functools.cache
def shared() -> Arena:
    """The arena of all networks: those that take turns take turns in the same memory."""
    return Arena()


class Lease:
    """A network's use of the shared arena: when the last reference goes, so does what lies idle there."""

    def __init__(self) -> None:
        self.arena = shared()

    def __del__(self) -> None:
        if "arena" in vars(self):
            self.arena.clear()

    def __reduce__(self) -> tuple[type[Lease], tuple[()]]:
        return Lease, ()


def in_arena(forward: Callable[P, Result]) -> Callable[P, Result]:
    """The forward of a network, whose `rewrites` say whether it runs inside the shared arena.

    What it returns is moved out, so that a caller who keeps it keeps nothing of the arena. Where gradients are
    recorded, activations outlive the call, and a graph that is compiled plans its own memory: neither runs inside.
    """

    @functools.wraps(forward)
    def run(*args: P.args, **kwargs: P.kwargs) -> Result:
        network: Any = args[0]
        if torch.compiler.is_compiling() or not network.rewrites.arena or _records(network, args[1:], kwargs):
            return forward(*args, **kwargs)
        lease = vars(network).get("_lease") or vars(network).setdefault("_lease", Lease())
        with lease.arena:
            result = forward(*args, **kwargs)
        _move_out(result)
        return result

    return run


def release(network: nn.Module) -> None:
    """Ends the use that a network makes of the shared arena, until it is called again."""
    for module in network.modules():
        vars(module).pop("_lease", None)


@contextmanager
def outside() -> Iterator[None]:
    """In this scope tensors come from the system again: for what is remembered longer than for a call."""
    extension = native.extension()
    if isinstance(extension, str):
        yield
        return
    extension.enter_outside()
    try:
        yield
    finally:
        extension.leave_outside()


def _move_out(value: Any) -> None:
    extension = native.extension()
    if not isinstance(extension, str):
        for tensor in _tensors(value):
            extension.move_out(tensor)


def _records(network: nn.Module, *values: Any) -> bool:
    return torch.is_grad_enabled() and any(
        tensor.requires_grad for source in (network.parameters(), _tensors(values)) for tensor in source
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def _quarter_of_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4
