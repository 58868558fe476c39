"""The table that a sampler is: one row of coefficients per model evaluation, float64, computed on the host."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from fastdiff.errors import InputError
from fastdiff.ops.row import (
    CLIP,
    GUIDANCE,
    INPUT_SCALE,
    INPUTS,
    KNOWN,
    NEW_ANCHOR,
    NEW_HISTORY,
    NEW_X,
    PREDICTION,
    ROW_SIZE,
    VARIANCE,
)
from fastdiff.parameterization import Linear
from fastdiff.samplers.grid import Grid
from fastdiff.samplers.problem import Point, Problem, Threshold
from fastdiff.schedules import Array

Coefficients = Mapping[str, float]


@dataclass(frozen=True)
class MethodInfo:
    """What a method is, for people and for `build`.

    order                  of convergence with the default options; of a stochastic method, of the deterministic method
                           it becomes without noise
    evaluations_per_step   how often the network is called in a step (Heun's last step to sigma = 0 takes one)
    history                how many earlier data predictions a step reads
    options                the method's own options and their defaults; `grid.GRID_OPTIONS` fit every method
    grid                   the grid's options where the caller names no spacing
    kinds                  of schedules that the method is defined on; empty: every kind
    inverse                whether it goes from an image to its noise: the grid rises
    diffusers              what to pass to `build` for the numbers of that diffusers class with its own defaults
    """

    name: str
    paper: str
    order: int
    stochastic: bool
    evaluations_per_step: int
    history: int
    options: Mapping[str, Any]
    rows: Callable[..., "StepTable"] = field(repr=False)
    grid: Mapping[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = ()
    inverse: bool = False
    diffusers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Row:
    """Coefficients (32,) as `fastdiff.ops.row` lays them out, the point where the network is called, and the
    signal-to-noise ratio of a Langevin step (0: the row is none)."""

    values: Array
    start: Point
    snr: float


class RowUse(NamedTuple):
    """What a row reads and writes, as the engine has to know it without looking at a device.

    keeps_state   the new anchor is the state itself
    """

    data: bool
    noise: bool
    anchor: bool
    history: int
    new_anchor: bool
    new_history: bool
    keeps_state: bool


@dataclass(frozen=True, eq=False)
class StepTable:
    """rows (R, 32) as `fastdiff.ops.row` lays them out; timesteps (R,) what the network is called with before each.

    The state starts as init_scale * standard normal noise, or at init_level[0] * image + init_level[1] * noise, and the
    network is given input_scale * state: first_input_scale before row 0, the row's own input_scale after it. A table of
    an inverse method starts from init_level[0] * image alone where its first level has no noise. After a
    row that writes history the slots turn (new, hist1, hist2); after a row that writes the anchor it is replaced.

    threshold          how D is bounded by its own size; None: only by the rows' clip
    snr (R,)           signal-to-noise ratio of Langevin steps, whose size follows from the norms; 0 elsewhere
    learned_variance   whether the network gives as many variance channels after its others
    """

    method: str
    prediction: str
    rows: Array
    timesteps: Array
    init_scale: float
    init_level: tuple[float, float]
    first_input_scale: float
    grid: Grid
    threshold: Threshold | None
    snr: Array
    _tensors: dict[torch.device | str, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def steps(self) -> int:
        """Solver steps; `len(table)` counts model evaluations."""
        return self.grid.steps

    @property
    def inverse(self) -> bool:
        """Whether the table goes from an image to its noise."""
        return self.grid.rising

    @property
    def learned_variance(self) -> bool:
        return bool(self.rows[:, VARIANCE].any())

    @cached_property
    def uses(self) -> tuple[RowUse, ...]:
        """What each row reads and writes."""
        return tuple(_use(row) for row in self.rows)

    @cached_property
    def depth(self) -> int:
        """How many tensors of history a row reads at most; older ones can be forgotten."""
        return max(use.history for use in self.uses)

    @cached_property
    def levels(self) -> Array:
        """(signal, noise) of the state that each row starts from, (R, 2)."""
        return np.concatenate([[self.init_level], self.rows[:-1, KNOWN]])

    def with_guidance(self, guidance: float | Array) -> "StepTable":
        """The same table with m = uncond + guidance * (cond - uncond), one number or one for each row."""
        rows = self.rows.copy()
        rows[:, GUIDANCE] = guidance
        return self.with_rows(rows)

    def with_rows(self, rows: Array) -> "StepTable":
        """The same table with other coefficients."""
        return replace(self, rows=rows)

    def tensor(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The rows as float32 on a device, made once per device."""
        made = self._tensors.get(device)  # a name is never a key, and a device is looked up without another
        if made is not None:
            return made
        device = torch.device(device)
        if device not in self._tensors:
            self._tensors[device] = torch.from_numpy(self.rows.astype(np.float32)).to(device)
        return self._tensors[device]


_STATE = [float(name == "x") for name in INPUTS]


def _use(row: Array) -> RowUse:
    blocks = row[NEW_X], row[NEW_HISTORY], row[NEW_ANCHOR]
    read = {name for block in blocks for name, value in zip(INPUTS, block.tolist(), strict=True) if value != 0.0}
    return RowUse(
        data="D" in read,
        noise="noise" in read,
        anchor="anchor" in read,
        history=max((number for number in (1, 2, 3) if f"hist{number}" in read), default=0),
        new_anchor=bool(row[NEW_ANCHOR].any()),
        new_history=bool(row[NEW_HISTORY].any()),
        keeps_state=row[NEW_ANCHOR].tolist() == _STATE,
    )


def make_row(
    problem: Problem,
    start: Point,
    new_x: Coefficients,
    *,
    to: Point,
    history: Coefficients | None = None,
    anchor: Coefficients | None = None,
    data: Linear | None = None,
    clip: bool = True,
    variance: float = 0.0,
    snr: float = 0.0,
) -> Row:
    """One model evaluation at `start` whose x' is a state at `to`: the coefficients of x', history' and anchor'.

    data       D from (x, m) where it is not the data prediction at `start`
    clip       whether D is bounded as the problem says
    variance   the noise is multiplied by exp(variance * v)
    snr        makes the row a Langevin step: D * e and noise * sqrt(2 e), e = 2 (snr |z| / |D|)^2
    """
    row = np.zeros(ROW_SIZE)
    linear = start.data if data is None else data
    row[GUIDANCE] = 1.0
    row[PREDICTION] = linear.x, linear.m
    row[CLIP] = math.inf if problem.clip is None or not clip else problem.clip
    for block, coefficients in ((NEW_X, new_x), (NEW_HISTORY, history or {}), (NEW_ANCHOR, anchor or {})):
        row[block] = [coefficients.get(name, 0.0) for name in INPUTS]
    row[INPUT_SCALE] = to.input_scale
    row[KNOWN] = to.level
    row[VARIANCE] = variance
    return Row(row, start, snr)


def make_table(method: str, problem: Problem, rows: Iterable[Row], *, init_scale: float | None = None) -> StepTable:
    """The finished table; init_scale is that of `Point.init_scale` unless a method starts otherwise."""
    made = list(rows)
    first = made[0].start
    table = np.stack([row.values for row in made])
    scale = first.init_scale if init_scale is None else init_scale
    finite = np.delete(table, CLIP, axis=1)
    if not (np.isfinite(finite).all() and math.isfinite(scale)):
        raise InputError(
            f"{method}: the schedule {problem.schedule.name!r} keeps no signal at its first timestep, which this "
            "method cannot start from; use another method or a smaller sigma_max"
        )
    times = np.array([row.start.timestep for row in made])
    snr = np.array([row.snr for row in made])
    for array in (table, times, snr):
        array.flags.writeable = False
    return StepTable(
        method,
        problem.prediction,
        table,
        times,
        scale,
        first.level,
        first.input_scale,
        problem.grid,
        problem.threshold,
        snr,
    )


def choice(method: str, name: str, value: Any, expected: tuple[str, ...]) -> str:
    """`value` if it is one of `expected`; InputError otherwise."""
    if value not in expected:
        raise InputError(f"{method}: {name}: expected one of {', '.join(expected)}, got {value!r}")
    return str(value)


def whole(method: str, name: str, value: Any, low: int, high: int) -> int:
    """`value` if it is a whole number from low to high; InputError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"{method}: {name}: expected a whole number from {low} to {high}, got {value!r}")
    return value


def fraction(method: str, name: str, value: Any, high: float = 1.0) -> float:
    """`value` as a float if it lies in [0, high]; InputError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 <= value <= high:
        raise InputError(f"{method}: {name}: expected a number from 0 to {high:g}, got {value!r}")
    return float(value)


def flag(method: str, name: str, value: Any) -> bool:
    """`value` if it is True or False; InputError otherwise."""
    if not isinstance(value, bool):
        raise InputError(f"{method}: {name}: expected True or False, got {value!r}")
    return value


def automatic_flag(method: str, name: str, value: Any) -> bool | None:
    """`value` if it is True, False or None; InputError otherwise."""
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{method}: {name}: expected True, False or None, got {value!r}")
    return value
