"""A network's step under PyTorch's profiler."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff.config import quieten_profiler
from fastdiff.profiling.layers import Event, Layer, layer
from fastdiff.profiling.machine import Machine
from fastdiff.profiling.recording import packed_products_recorded

__all__ = ["Profile", "Row", "profile"]

_STEP = "fastdiff step"
BETWEEN = Layer("between operators", "")
"""Python, and what no operator's call shows."""


_Calls = dict[tuple[str, str], list[tuple[Layer, float]]]
"""The calls of a step by operator and shape: each a layer and its seconds."""


@dataclass(frozen=True)
class Row:
    """The calls of one layer, or of one operator, in a step.

    seconds: of all of them together; best: what the machine's measured rates allow for their operations and bytes, 0
    where neither is known; computing: whether operations bound that and not bytes.
    """

    operator: str
    shape: str
    calls: int
    seconds: float
    flops: int
    bytes: int
    best: float
    computing: bool

    @property
    def name(self) -> str:
        return f"{self.operator} {self.shape}".strip()


@dataclass(frozen=True)
class Profile:
    """seconds: a step without the profiler; rows: its layers, the longest first, whose seconds add up to a step with
    it. peak: operations in a second that the machine reaches."""

    seconds: float
    rows: tuple[Row, ...]
    peak: float

    @property
    def profiled(self) -> float:
        return sum(row.seconds for row in self.rows)

    @property
    def flops(self) -> int:
        return sum(row.flops for row in self.rows)

    def operators(self) -> list[Row]:
        """The rows of each operator together, the longest first."""
        found: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            found[row.operator].append(row)
        return _sorted([_together(name, rows) for name, rows in found.items()])


def profile(call: Callable[[], Any], *, dtype: torch.dtype, steps: int = 5, machine: Machine | None = None) -> Profile:
    """Where the time of `call` goes, in the median of `steps` calls, after two that do not count.

    call: takes a step on the CPU. dtype: that of its products, for the machine's rate.
    """
    machine = machine or Machine()
    with torch.no_grad():
        call()
        call()
        plain = statistics.median(_seconds(call) for _ in range(steps))
        recorded = _recorded(call, steps)
    rows = [_row(name, calls, recorded, dtype, machine) for name, calls in recorded[-1].items()]
    return Profile(plain, tuple(_sorted(rows)), machine.flops(dtype))


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _recorded(call: Callable[[], Any], steps: int) -> list[_Calls]:
    """The calls of each layer, for each of so many steps."""
    quieten_profiler()
    with packed_products_recorded(), torch.autograd.profiler.profile(record_shapes=True) as recorder:
        for _ in range(steps):
            with torch.profiler.record_function(_STEP):
                call()
    events: Any = recorder.function_events
    return [_layers(event) for event in events if event.name == _STEP]


def _layers(step: Any) -> _Calls:
    found: _Calls = defaultdict(list)
    for event in step.cpu_children:
        of = layer(Event.of(event))
        found[of.operator, of.shape].append((of, event.cpu_time_total * 1e-6))
    found[BETWEEN.operator, BETWEEN.shape].append((BETWEEN, step.self_cpu_time_total * 1e-6))
    return found


def _row(
    name: tuple[str, str],
    calls: Sequence[tuple[Layer, float]],
    steps: Sequence[_Calls],
    dtype: torch.dtype,
    machine: Machine,
) -> Row:
    """calls: those of one step; steps: of all, over which the median is taken."""
    flops, moved = (sum(getattr(of, what) for of, _ in calls) for what in ("flops", "bytes"))
    best = sum(machine.seconds(of.flops, of.bytes, dtype) for of, _ in calls)
    seconds = statistics.median(sum(taken for _, taken in step.get(name, ())) for step in steps)
    computing = flops > 0 and flops / machine.flops(dtype) > 0.5 * best
    return Row(*name, len(calls), seconds, flops, moved, best, computing)


def _together(operator: str, rows: list[Row]) -> Row:
    computing = sum(row.best for row in rows if row.computing)
    best = sum(row.best for row in rows)
    return Row(
        operator,
        "",
        calls=sum(row.calls for row in rows),
        seconds=sum(row.seconds for row in rows),
        flops=sum(row.flops for row in rows),
        bytes=sum(row.bytes for row in rows),
        best=best,
        computing=computing > best / 2,
    )


def _sorted(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: -row.seconds)
