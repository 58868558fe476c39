"""The record of other people's networks: which run on fastdiff's, and which calls were left to their own code."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from typing import Protocol


class Converted(Protocol):
    """A network that runs on fastdiff's. Its copies: bytes of what was computed from its parameters and is kept."""

    name: str

    def copies(self) -> int: ...


_converted: weakref.WeakSet[Converted] = weakref.WeakSet()
_left: Counter[tuple[str, str]] = Counter()
_lock = threading.Lock()


def watch(network: Converted) -> None:
    with _lock:
        _converted.add(network)


def forget(network: Converted) -> None:
    with _lock:
        _converted.discard(network)


def leave(name: str, reason: str, *, calls: int) -> None:
    """Notes calls that ran on the network's own code; none where it was left as it is from the beginning."""
    with _lock:
        _left[name, reason] += calls


def take(*, reset: bool) -> tuple[dict[str, int], dict[tuple[str, str], int]]:
    """{name: bytes of copies} of the networks in use, and {(name, reason): calls} of what was left."""
    with _lock:
        networks = sorted(_converted, key=lambda network: network.name)
        left = dict(_left)
        if reset:
            _left.clear()
    copies: dict[str, int] = {}
    for network in networks:
        name, number = network.name, 2
        while name in copies:
            name, number = f"{network.name} ({number})", number + 1
        copies[name] = network.copies()
    return copies, left
