"""Tables from what a scheduler of diffusers already knows: its own levels and timesteps, taken as they are.

The rows are those of `fastdiff.samplers`; only the grid is not ours, so every spacing that diffusers has, and every one
that it will have, gives the levels that it gives there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from torch import Tensor

from fastdiff import samplers, schedules
from fastdiff.ops.row import CLIP, INPUTS, KNOWN, NEW_ANCHOR, NEW_HISTORY, NEW_X, PREDICTION
from fastdiff.samplers.grid import Grid
from fastdiff.samplers.problem import Problem, Threshold
from fastdiff.samplers.table import StepTable
from fastdiff.schedules import Array, Schedule

DataSlot = Literal["history", "anchor"] | None
PREDICTIONS = {
    "epsilon": "epsilon",
    "v_prediction": "v",
    "sample": "sample",
    "original_sample": "sample",
    "flow_prediction": "flow",
}
_KEPT_TABLES = 64


def levels(sigmas: Tensor | Sequence[float], *, flow: bool = False) -> tuple[Array, Array]:
    """(alpha, sigma) of levels as diffusers holds them: sigma / alpha of a schedule that keeps the variance, or the
    sigma of a flow, whose alpha is 1 - sigma."""
    level = np.asarray(sigmas, dtype=np.float64)
    if flow:
        return 1.0 - level, level
    alphas = 1.0 / np.sqrt(1.0 + level**2)
    return alphas, level * alphas


def table(
    method: str,
    *,
    schedule: Schedule,
    prediction: str,
    timesteps: Sequence[float],
    alphas: Array,
    sigmas: Array,
    clip: float | None = None,
    threshold: Threshold | None = None,
    skipped: int = 0,
    gives_data: bool = False,
    options: Mapping[str, Any] | None = None,
) -> StepTable:
    """The table of a method on those points; `alphas` and `sigmas` have the end of the last step besides.

    skipped      steps of the whole run that come before the first
    gives_data   whether the caller is given the data prediction of each row, in the slot of `data_slot`
    """
    times = (*timesteps, 0.0)
    return _table(
        method,
        schedule,
        prediction,
        clip,
        threshold,
        tuple(times[: len(alphas)]),
        tuple(alphas.tolist()),
        tuple(sigmas.tolist()),
        skipped,
        gives_data,
        tuple(sorted((options or {}).items())),
    )


@lru_cache(maxsize=_KEPT_TABLES)
def _table(
    method: str,
    schedule: Schedule,
    prediction: str,
    clip: float | None,
    threshold: Threshold | None,
    timesteps: tuple[float, ...],
    alphas: tuple[float, ...],
    sigmas: tuple[float, ...],
    skipped: int,
    gives_data: bool,
    options: tuple[tuple[str, Any], ...],
) -> StepTable:
    grid = Grid(np.array(timesteps), np.array(alphas), np.array(sigmas), skipped)
    made = samplers.find(method).rows(Problem(schedule, grid, prediction, clip, threshold), **dict(options))
    return differenced(giving_data(made) if gives_data else made)


def differenced(made: StepTable) -> StepTable:
    """The same table with (x - sigma m) in place of D = (x - sigma m) / alpha, and 1/alpha in what is made of it.

    diffusers takes the difference first. Near pure noise it cancels, and 1/alpha is in the thousands, so that the other
    order would round to another D.
    """
    scale = np.maximum(made.rows[:, PREDICTION.start], 1.0)
    if made.threshold is not None or np.all(scale == 1.0):
        return made
    rows = made.rows.copy()
    rows[:, PREDICTION] /= scale[:, None]
    rows[:, CLIP] /= scale
    for slot in (NEW_X, NEW_HISTORY, NEW_ANCHOR):
        rows[:, slot.start + INPUTS.index("D")] *= scale
    rows.flags.writeable = False
    return made.with_rows(rows)


def giving_data(made: StepTable) -> StepTable:
    """The same table whose rows also write D, into the slot that they leave free; a row that already has its data
    prediction there keeps it."""
    slot = {"history": NEW_HISTORY, "anchor": NEW_ANCHOR}[data_slot(made) or "anchor"]
    rows = made.rows.copy()
    rows[~rows[:, slot].any(axis=1), slot.start + INPUTS.index("D")] = 1.0
    rows.flags.writeable = False
    return made.with_rows(rows)


def on_both_inputs(made: StepTable, slope: str) -> StepTable:
    """The same table for steps of two calls whose second reads x and `slope` (m or D) of the first, which the caller
    has already, as anchor and history, in place of a sum of the two that would have to be made and kept."""
    rows = made.rows.copy()
    x, old, anchor, history = (INPUTS.index(name) for name in ("x", slope, "anchor", "hist1"))
    for first, second in zip(rows[:-1:2], rows[1::2], strict=True):
        kept, new = first[NEW_ANCHOR].copy(), second[NEW_X]
        new[history] = new[anchor] * kept[old]
        new[anchor] *= kept[x]
        first[NEW_ANCHOR] = 0.0
        first[NEW_ANCHOR.start + x] = 1.0
    rows.flags.writeable = False
    return made.with_rows(rows)


def negated(made: StepTable) -> StepTable:
    """The same table for a network that gives -m."""
    rows = made.rows.copy()
    rows[:, PREDICTION.start + 1] *= -1.0
    for slot in (NEW_X, NEW_HISTORY, NEW_ANCHOR):
        rows[:, slot.start + INPUTS.index("m")] *= -1.0
    rows.flags.writeable = False
    return made.with_rows(rows)


def scaled(made: StepTable) -> StepTable:
    """The same table for the state x / alpha, of a method whose state is x."""
    rows, start = made.rows.copy(), made.levels[:, 0]
    rows[:, PREDICTION.start] *= start
    for slot in (NEW_X, NEW_HISTORY, NEW_ANCHOR):
        rows[:, slot.start + INPUTS.index("x")] *= start
    if made.prediction == "epsilon":
        # x / alpha - (sigma / alpha) m, which nothing multiplies: a factor's rounding would be left where they cancel.
        scale = rows[:, PREDICTION.start].copy()
        rows[:, PREDICTION] /= scale[:, None]
        rows[:, CLIP] /= scale
        for slot in (NEW_X, NEW_HISTORY, NEW_ANCHOR):
            rows[:, slot.start + INPUTS.index("D")] *= scale
    rows[:, NEW_X] /= rows[:, KNOWN.start, None]
    rows.flags.writeable = False
    return made.with_rows(rows)


def data_slot(made: StepTable) -> DataSlot:
    """The slot that no row reads, so that D can be written there; None if all are read."""
    if not any(use.anchor for use in made.uses):
        return "anchor"
    return None if any(use.history for use in made.uses) else "history"


@lru_cache(maxsize=_KEPT_TABLES)
def _custom(alphas_cumprod: tuple[float, ...]) -> Schedule:
    *others, last = alphas_cumprod
    if others and last >= others[-1]:
        # At a zero terminal SNR diffusers writes 2^-24 there, which can lie above the value before it.
        last = 0.0
    return schedules.custom((*others, last))


def schedule_of(alphas_cumprod: Tensor) -> Schedule:
    """Their own schedule, value for value; equal ones are one object, so that tables are shared."""
    return _custom(tuple(alphas_cumprod.double().tolist()))


@lru_cache(maxsize=_KEPT_TABLES)
def flow_schedule(steps: int) -> Schedule:
    """The flow schedule of so many training timesteps; equal ones are one object, so that tables are shared."""
    return schedules.flow(steps)


def threshold_of(config: Mapping[str, Any]) -> Threshold | None:
    """Dynamic thresholding as diffusers' configuration says it."""
    if not config.get("thresholding"):
        return None
    return Threshold(config["dynamic_thresholding_ratio"], config["sample_max_value"])
