"""Tables of one-step methods whose steps each go from one timestep to another, in no order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fastdiff import samplers, schedules
from fastdiff.integrations.diffusers.tables import differenced, giving_data
from fastdiff.ops.row import NEW_ANCHOR, NEW_X
from fastdiff.samplers.grid import Grid
from fastdiff.samplers.problem import End, Problem, Threshold
from fastdiff.samplers.table import StepTable

_KEPT_TABLES = 64
_TRAINED = schedules.linear(2)
"""Stands in for any schedule that keeps the variance: all points are given, so that only its kind counts."""


class Step(NamedTuple):
    """A step by the values of alpha^2 where it starts and ends.

    added    the variance that the forward process adds from the end to the start, as diffusers has it
    shrink   what the forward process multiplies by, where diffusers has another than the levels
    beyond   alpha^2 of the point that TCD passes the end to
    sigma    of the start, where diffusers has another than the root of 1 - alpha^2
    """

    timestep: float
    start: float
    end: float
    added: float | None = None
    shrink: float | None = None
    beyond: float | None = None
    sigma: float | None = None


class Made(NamedTuple):
    """Rows of those steps that have one; `kept` says which. A step has none where its numbers are not finite."""

    table: StepTable
    kept: tuple[int, ...]


def one_step_table(
    method: str,
    steps: Sequence[Step],
    *,
    prediction: str,
    clip: float | None = None,
    threshold: Threshold | None = None,
    gives_data: bool = True,
    options: Mapping[str, Any] | None = None,
) -> Made | None:
    """A row for each step, with D in the anchor's slot where the caller is given it; None where no step has a row."""
    return _made(method, tuple(steps), prediction, clip, threshold, gives_data, tuple((options or {}).items()))


@lru_cache(maxsize=_KEPT_TABLES)
def _made(
    method: str,
    steps: tuple[Step, ...],
    prediction: str,
    clip: float | None,
    threshold: Threshold | None,
    gives_data: bool,
    options: tuple[tuple[str, Any], ...],
) -> Made | None:
    def rows(some: Sequence[Step]) -> StepTable | None:
        more = dict(options)
        if some[0].beyond is not None:
            more["beyond"] = tuple(_ratio(step.beyond) for step in some)
        try:
            made = samplers.find(method).rows(_problem(some, prediction, clip, threshold), **more)
        except (ValueError, ZeroDivisionError):
            return None
        return differenced(giving_data(made) if gives_data else made)

    table = rows(steps)
    if table is not None:
        return Made(table, tuple(range(len(steps))))
    kept = tuple(index for index, step in enumerate(steps) if rows([step]) is not None)
    table = rows([steps[index] for index in kept]) if kept else None
    return None if table is None else Made(table, kept)


def _problem(steps: Sequence[Step], prediction: str, clip: float | None, threshold: Threshold | None) -> Problem:
    starts = np.array([step.start for step in steps] + [steps[-1].end])
    times = np.array([step.timestep for step in steps] + [0.0])
    levels = [(math.sqrt(step.end), math.sqrt(1.0 - step.end), step.added, step.shrink) for step in steps]
    given = [step.sigma for step in steps]
    sigmas = np.array([math.sqrt(1.0 - a) if s is None else s for a, s in zip(starts, [*given, None], strict=True)])
    grid = Grid(times, np.sqrt(starts), sigmas)
    return Problem(_TRAINED, grid, prediction, clip, threshold, [End(0.0, *level) for level in levels])


def _ratio(alpha_squared: float | None) -> float:
    return math.sqrt((1.0 - alpha_squared) / alpha_squared) if alpha_squared else math.inf


def giving_another_end(made: StepTable, other: StepTable) -> StepTable:
    """The rows of the first table, which also write, as the anchor, where those of the other lead."""
    rows = made.rows.copy()
    rows[:, NEW_ANCHOR] = other.rows[:, NEW_X]
    rows.flags.writeable = False
    return made.with_rows(rows)
