"""Timing: every contender in turn, in one process, many times over; and what the machine can do at best.

A turn in which our threads had to wait for a processor that other programs used tells nothing about a contender. Linux
says how long they waited; such turns are taken again, and a contender that had no rest is left out.

Threads also wait for each other: where a library wakes more than there are processors, or puts two on one. That is part
of its time. Where turns are long enough for the clock of /proc/stat, it tells whose waiting it was.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from benchmarks.work import Contender

LEAST_ROUNDS = 7
LEAST_SAMPLES = 3
LONGEST = 10
"""Times the seconds asked for, after which LEAST_ROUNDS no longer counts."""
WARM_UP = 3
DISTURBED = 0.02
"""Share of a turn that waiting for a processor may take."""
TRIES = 20
STAT = Path("/proc/stat")
TICK = 1 / os.sysconf("SC_CLK_TCK")
"""Seconds in which Linux counts the use of the processors."""
SURE = TICK / DISTURBED
"""Seconds of turns over which that tells who disturbed them."""
REST = 0.02
"""Seconds before a long turn, in which the threads that the contender before has left spinning fall asleep."""


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, over `rounds` samples of `calls` calls each. disturbed: share of all turns that other
    programs disturbed, which are not among these."""

    p20: float
    p50: float
    p80: float
    rounds: int
    calls: int
    disturbed: float


def interleave(contenders: Sequence[Contender], device: torch.device, *, seconds: float) -> dict[str, Timing]:
    """Time all contenders for about `seconds`: rounds in which each has one turn, the order rotating.

    What disturbs the machine for a moment then disturbs all of them, and medians leave it out. On a GPU a turn ends
    when the device has finished. A contender without LEAST_SAMPLES undisturbed turns is not in the result.
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
    return {name: turn.timing() for name, turn in turns.items() if len(turn.samples) >= LEAST_SAMPLES}


def _goes_on(rounds: int, spent: float, seconds: float) -> bool:
    """Whether there is to be another round: at least LEAST_ROUNDS, but 5 are enough once they take long."""
    return rounds < 5 or spent < seconds or (rounds < LEAST_ROUNDS and spent < LONGEST * seconds)


class _Turn:
    """A contender with the number of calls that fill a sample long enough for the clock."""

    def __init__(self, contender: Contender, device: torch.device, least: float = 0.002) -> None:
        self.contender, self.device = contender, device
        self.calls = 1
        self.samples: list[float] = []
        self.disturbed: list[float] = []
        once = self._shortest(WARM_UP)
        while once < least and self.calls < 10_000:
            self.calls = max(self.calls + 1, min(10 * self.calls, int(self.calls * least / max(once, 1e-9)) + 1))
            once = self._shortest(WARM_UP)
        self.long = once >= SURE / TRIES

    def _shortest(self, tries: int) -> float:
        """Of several tries, or of as many as half a second holds."""
        times = [self._seconds(self.calls)]
        while len(times) < tries and sum(times) < 0.5:
            times.append(self._seconds(self.calls))
        return min(times)

    def take(self) -> None:
        """An undisturbed sample. Of long turns that waited, as many as it takes to know for whom: all or none of them
        count."""
        if self.long:
            time.sleep(REST)
        waiting: list[float] = []
        start, used = time.perf_counter(), others()
        for _ in range(TRIES):
            waited = _waited()
            seconds = self._seconds(self.calls)
            still = _waited() - waited <= DISTURBED * seconds
            (self.samples if still else waiting).append(seconds / self.calls)
            if time.perf_counter() - start >= SURE or (still and not (waiting and self.long)):
                break
        spent = time.perf_counter() - start
        own = spent >= SURE and others() - used <= DISTURBED * spent + TICK
        (self.samples if own else self.disturbed).extend(waiting)

    def timing(self) -> Timing:
        p20, p50, p80 = np.percentile(self.samples, (20, 50, 80))
        disturbed = len(self.disturbed) / (len(self.samples) + len(self.disturbed))
        return Timing(float(p20), float(p50), float(p80), len(self.samples), self.calls, disturbed)

    def _seconds(self, calls: int) -> float:
        call = self.contender.call
        with self.contender.context():
            _synchronize(self.device)
            start = time.perf_counter()
            for _ in range(calls):
                call()
            _synchronize(self.device)
            return time.perf_counter() - start


def _waited() -> float:
    """Seconds that threads of this process have been ready to run without a processor; 0 where Linux does not say."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except OSError:
            continue  # a thread that ended meanwhile
    return total * 1e-9


def others() -> float:
    """Seconds of processors that were neither idle nor this process's, from any start, to a TICK; not a number where
    Linux does not say."""
    try:
        lines = STAT.read_text().splitlines()
    except OSError:
        return math.nan
    processors = sum(line.startswith("cpu") for line in lines) - 1
    idle = TICK * sum(map(int, lines[0].split()[4:6]))
    return processors * time.perf_counter() - idle - time.process_time()


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


def _shortest(call: Callable[[], object], device: torch.device, seconds: float = 0.3) -> float:
    """The shortest time of a call; 0 if other programs disturbed it all the time."""
    turn = _Turn(Contender("", call), device, least=0.0005)  # type: ignore[arg-type]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        turn.take()
    return min(turn.samples, default=0.0)


def copy_time(traffic: int, device: torch.device) -> float:
    """Seconds of a copy that moves, read and written together, `traffic` bytes (caches included)."""
    source, target = (torch.ones(max(traffic // 8, 1), device=device) for _ in range(2))
    return _shortest(lambda: target.copy_(source), device)


@cache
def matmul_time(dtype: str, device: torch.device) -> float:
    """Seconds of one operation, a multiplication or an addition, in a large square matrix product."""
    n = 1024 if device.type == "cpu" else 8192
    a, b = (torch.ones(n, n, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
    return _shortest(lambda: a @ b, device) / (2 * n**3)


def roofline(traffic: int, flops: int, dtype: str, device: torch.device) -> float:
    """Seconds that the work takes at the machine's measured rates; 0 if it is not counted or could not be measured."""
    copying = copy_time(traffic, device) if traffic else 0.0
    return max(copying, flops * matmul_time(dtype, device)) if flops else copying
