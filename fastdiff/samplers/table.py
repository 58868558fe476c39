"""The table that a sampler is: one row of coefficients per model evaluation, float64, computed on the host."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from fastdiff.errors import InputError
from fastdiff.ops.row import CLIP, GUIDANCE, INPUT_SCALE, INPUTS, NEW_ANCHOR, NEW_HISTORY, NEW_X, PREDICTION, ROW_SIZE
from fastdiff.parameterization import Linear
from fastdiff.samplers.grid import Grid
from fastdiff.schedules import Array, Schedule

Coefficients = Mapping[str, float]


@dataclass(frozen=True)
class Problem:
    """What every method starts from: the grid, what the network predicts, and the bound of the data prediction."""

    schedule: Schedule
    grid: Grid
    prediction: str
    clip: float | None


@dataclass(frozen=True)
class MethodInfo:
    """What a method is, for people and for `build`.

    order                  of convergence; of a stochastic method, of the deterministic method it becomes without noise
    evaluations_per_step   how often the network is called in a step (Heun's last step to sigma = 0 takes one)
    history                how many earlier data predictions a step reads
    options                the method's own options and their defaults; `grid.GRID_OPTIONS` fit every method
    grid                   the grid's options where the caller names no spacing
    diffusers              what to pass to `build` for the numbers of that diffusers class with its own defaults
    """

    name: str
    paper: str
    order: int
    stochastic: bool
    evaluations_per_step: int
    history: int
    options: Mapping[str, Any]
    diffusers: Mapping[str, Any]
    rows: Callable[..., "StepTable"] = field(repr=False)
    grid: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RowUse:
    """What a row reads and writes, as the engine has to know it without looking at a device."""

    noise: bool
    anchor: bool
    history: int
    new_anchor: bool
    new_history: bool


@dataclass(frozen=True, eq=False)
class StepTable:
    """rows (R, 32) as `fastdiff.ops.row` lays them out; timesteps (R,) what the network is called with before each.

    The state starts as init_scale * standard normal noise and the network is given input_scale * state:
    first_input_scale before row 0, the row's own input_scale after it. After a row that writes history the slots turn
    (new, hist1, hist2); after a row that writes the anchor it is replaced.
    """

    method: str
    prediction: str
    rows: Array
    timesteps: Array
    init_scale: float
    first_input_scale: float
    grid: Grid
    _tensors: dict[torch.device, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def steps(self) -> int:
        """Solver steps; `len(table)` counts model evaluations."""
        return self.grid.steps

    @cached_property
    def uses(self) -> tuple[RowUse, ...]:
        """What each row reads and writes."""
        return tuple(_use(row) for row in self.rows)

    def with_guidance(self, guidance: float) -> "StepTable":
        """The same table with m = uncond + guidance * (cond - uncond)."""
        rows = self.rows.copy()
        rows[:, GUIDANCE] = guidance
        return replace(self, rows=rows)

    def tensor(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The rows as float32 on a device, made once per device."""
        device = torch.device(device)
        if device not in self._tensors:
            self._tensors[device] = torch.from_numpy(self.rows.astype(np.float32)).to(device)
        return self._tensors[device]


def _use(row: Array) -> RowUse:
    blocks = row[NEW_X], row[NEW_HISTORY], row[NEW_ANCHOR]
    read = {name for block in blocks for name, value in zip(INPUTS, block.tolist(), strict=True) if value != 0.0}
    return RowUse(
        noise="noise" in read,
        anchor="anchor" in read,
        history=max((number for number in (1, 2, 3) if f"hist{number}" in read), default=0),
        new_anchor=bool(row[NEW_ANCHOR].any()),
        new_history=bool(row[NEW_HISTORY].any()),
    )


def make_row(
    data: Linear,
    new_x: Coefficients,
    *,
    clip: float | None = None,
    history: Coefficients | None = None,
    anchor: Coefficients | None = None,
    input_scale: float = 1.0,
) -> Array:
    """One row: D = clamp(data.x * x + data.m * m, -clip, clip), then the coefficients of x', history' and anchor'."""
    row = np.zeros(ROW_SIZE)
    row[GUIDANCE] = 1.0
    row[PREDICTION] = data.x, data.m
    row[CLIP] = math.inf if clip is None else clip
    for block, coefficients in ((NEW_X, new_x), (NEW_HISTORY, history or {}), (NEW_ANCHOR, anchor or {})):
        row[block] = [coefficients.get(name, 0.0) for name in INPUTS]
    row[INPUT_SCALE] = input_scale
    return row


def make_table(
    method: str,
    problem: Problem,
    rows: Iterable[Array],
    *,
    timesteps: Array | None = None,
    init_scale: float = 1.0,
    first_input_scale: float = 1.0,
) -> StepTable:
    """The finished table; timesteps are the grid's unless a method calls the network elsewhere too."""
    table = np.stack(list(rows))
    finite = np.delete(table, CLIP, axis=1)
    if not np.isfinite(finite).all():
        raise InputError(
            f"{method}: the schedule {problem.schedule.name!r} keeps no signal at its first timestep, which this "
            "method cannot start from; use another method or a smaller sigma_max"
        )
    times = problem.grid.timesteps[:-1] if timesteps is None else timesteps
    for array in (table, times):
        array.flags.writeable = False
    return StepTable(method, problem.prediction, table, times, init_scale, first_input_scale, problem.grid)


def choice(method: str, name: str, value: Any, expected: tuple[str, ...]) -> str:
    """`value` if it is one of `expected`; InputError otherwise."""
    if value not in expected:
        raise InputError(f"{method}: {name}: expected one of {', '.join(expected)}, got {value!r}")
    return str(value)


def fraction(method: str, name: str, value: Any, high: float = 1.0) -> float:
    """`value` as a float if it lies in [0, high]; InputError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= high:
        raise InputError(f"{method}: {name}: expected a number from 0 to {high:g}, got {value!r}")
    return float(value)
