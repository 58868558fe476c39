"""Timing: every contender in turn, in one process, many times over; and what the machine can do at best."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from benchmarks.work import Contender

LEAST_ROUNDS = 7
LONGEST = 10
"""Times the seconds asked for, after which LEAST_ROUNDS no longer counts."""
WARM_UP = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over `rounds` samples of `calls` calls each."""

    p20: float
    p50: float
    p80: float
    rounds: int
    calls: int


def interleave(contenders: Sequence[Contender], device: torch.device, *, seconds: float) -> dict[str, Timing]:
    """Time all contenders for about `seconds`: rounds in which each has one turn, the order rotating.

    What disturbs the machine for a moment then disturbs all of them, and medians leave it out. On a GPU a turn ends
    when the device has finished.
    """
    turns = {contender.name: _Turn(contender, device) for contender in contenders}
    names = list(turns)
    with _no_garbage_collection():
        start = time.perf_counter()
        rounds = 0
        while _goes_on(rounds, time.perf_counter() - start, seconds):
            first = rounds % len(names)
            for name in names[first:] + names[:first]:
                turns[name].take()
            rounds += 1
    return {name: turn.timing() for name, turn in turns.items()}


def _goes_on(rounds: int, spent: float, seconds: float) -> bool:
    """Whether there is to be another round: at least LEAST_ROUNDS, but 3 are enough once they take long."""
    return rounds < 3 or spent < seconds or (rounds < LEAST_ROUNDS and spent < LONGEST * seconds)


class _Turn:
    """A contender with the number of calls that fill a sample long enough for the clock."""

    def __init__(self, contender: Contender, device: torch.device, least: float = 0.002) -> None:
        self.contender, self.device = contender, device
        self.calls = 1
        self.samples: list[float] = []
        spent = once = self._seconds(1)
        for _ in range(WARM_UP - 1):
            if spent < 0.5:
                once = self._seconds(1)
                spent += once
        while once < least and self.calls < 10_000:
            self.calls = max(self.calls + 1, min(10 * self.calls, int(self.calls * least / max(once, 1e-9)) + 1))
            once = self._seconds(self.calls)

    def take(self) -> None:
        self.samples.append(self._seconds(self.calls) / self.calls)

    def timing(self) -> Timing:
        p20, p50, p80 = np.percentile(self.samples, (20, 50, 80))
        return Timing(float(p20), float(p50), float(p80), len(self.samples), self.calls)

    def _seconds(self, calls: int) -> float:
        call = self.contender.call
        with self.contender.context():
            _synchronize(self.device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            _synchronize(self.device)
            return time.perf_counter() - start


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _best(call: Callable[[], object], device: torch.device, seconds: float = 0.2) -> float:
    """The shortest time of a call: what the machine can do when nothing disturbs it."""
    turn = _Turn(Contender("", call), device, least=0.0005)  # type: ignore[arg-type]
    end = time.perf_counter() + seconds
    while len(turn.samples) < LEAST_ROUNDS or time.perf_counter() < end:
        turn.take()
    return min(turn.samples)


@cache
def copy_rate(traffic: int, device: torch.device) -> float:
    """Bytes a second, read and written together, of a copy that moves about `traffic` bytes (caches included)."""
    count = max(traffic // 8, 1)
    source, target = (torch.ones(count, device=device) for _ in range(2))
    return 8 * count / _best(lambda: target.copy_(source), device)


@cache
def matmul_rate(dtype: str, device: torch.device) -> float:
    """Operations a second of a large square matrix product."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return 2 * n**3 / _best(lambda: a @ b, device, seconds=0.3)


def roofline(traffic: int, flops: int, dtype: str, device: torch.device) -> float:
    """Seconds that the work takes at the machine's measured rates; 0 if it is not counted."""
    times = [0.0]
    if traffic:
        # Powers of two: cases of about one size share a measurement.
        times.append(traffic / copy_rate(1 << (traffic - 1).bit_length(), device))
    if flops:
        times.append(flops / matmul_rate(dtype, device))
    return max(times)
