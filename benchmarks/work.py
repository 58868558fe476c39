"""A case made concrete: the calls that are timed, and what their results are held to."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

import fastdiff
from fastdiff.config import BACKENDS

OURS = "fastdiff "
"""A contender of this name plus a backend is our own."""
AUTOMATIC = "automatic"
"""Stands for the backends that are chosen where none is demanded."""


class FirstTimed:
    """A call that remembers how many seconds its first one took, with all that is made ready in it."""

    def __init__(self, call: Callable[[], Tensor]) -> None:
        self._call = call
        self.first: float | None = None

    def __call__(self) -> Tensor:
        if self.first is not None:
            return self._call()
        start = time.perf_counter()
        result = self._call()
        self.first = time.perf_counter() - start
        return result


@dataclass(frozen=True)
class Contender:
    """One way to do the work. call takes nothing and gives the tensor that the gate looks at."""

    name: str
    call: Callable[[], Tensor]

    @property
    def first(self) -> float | None:
        """Seconds of its first call, where that is worth knowing."""
        return self.call.first if isinstance(self.call, FirstTimed) else None

    @property
    def backend(self) -> str | None:
        return self.name.removeprefix(OURS) if self.name.startswith(OURS) else None

    def context(self) -> AbstractContextManager[Any]:
        """What `call` runs inside: our contenders on the one backend they are named by."""
        return nullcontext() if self.backend in (None, AUTOMATIC) else fastdiff.use_backend(self.backend)


@dataclass(frozen=True)
class Work:
    """peers: what others do, the baseline first. ours: the public call. truth: its result, computed in float64; plain:
    what plain PyTorch gives in the case's dtype. comparable: whether peers compute the same numbers (noise of another
    generator is not the same). traffic, flops: the bytes that must move and the operations that must be done, 0 if not
    counted. steps: sampler steps in one call. backends: ours to be timed, as far as they can run it.
    """

    peers: Mapping[str, Callable[[], Tensor]]
    ours: Callable[[], Tensor]
    truth: Tensor
    plain: Tensor
    comparable: bool = True
    traffic: int = 0
    flops: int = 0
    steps: int = 0
    backends: tuple[str, ...] = BACKENDS

    def contenders(self) -> list[Contender]:
        ours = [Contender(OURS + backend, self.ours) for backend in self.backends]
        return [*(Contender(name, call) for name, call in self.peers.items()), *ours]
