"""Rows read off diffusers' own arithmetic, to the last bit of its float32 coefficients.

A step of diffusers is linear in the state, the converted network output, the earlier ones and the noise: what it makes
of unit vectors is the row. So its orders, its starts and ends and its faults are followed as they are, and so is its
rounding. Its float32 coefficients are differences of nearly equal numbers where steps are many (DEIS of order 3 loses
the second digit at 999 steps), and exact ones would make other steps than its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.integrations.diffusers.tables import threshold_of
from fastdiff.integrations.diffusers.trial import rows_left
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
)
from fastdiff.parameterization import Linear
from fastdiff.samplers.grid import Grid
from fastdiff.samplers.table import Coefficients, StepTable
from fastdiff.samplers.terms import total
from fastdiff.schedules import Array

KEPT_TABLES = 64
HISTORY = ("hist1", "hist2", "hist3")
_COLUMNS = ("x", "q", "anchor", *HISTORY, "noise", "last_noise")
_FAULTS = (AssertionError, IndexError, RuntimeError, UnboundLocalError)
"""What the steps of diffusers end in where it has no such step."""
_TERMS = ("x", "anchor"), ("q", *HISTORY)
# Of a state, of an output, and of the network's in the data: with larger factors a result of size 1 is a difference of
# terms whose roundings, which are not diffusers', come near to 1e-5 of it.
_MOST_GROWTH = 3.0
_MOST_WEIGHT = 10.0
_MOST_GROWTH_OF_DATA = 30.0
_kept: dict[Hashable, Measured] = {}


@dataclass(frozen=True, eq=False)
class Measured:
    """The rows of a run.

    fault        what the step after the last row ends in, where diffusers has fewer steps than timesteps
    theirs       rows that are left to diffusers: those of large terms that cancel, so that the rounding of each is left
                 (with the noise prediction, backwards, and where data are bounded near to pure noise), those in which
                 it divides by zero, and those that a trial has shown to be others (`rows_left`)
    last_noise   how much of the last step's noise each row wants in its anchor
    """

    table: StepTable
    fault: Exception | None
    theirs: frozenset[int]
    last_noise: tuple[float, ...]


@dataclass(frozen=True)
class Solver:
    """A class of diffusers, and what of it its `step` does not say.

    anchor      the attribute that holds the earlier state which a later step starts from
    corrector   the method that corrects the state before a step is taken from it
    """

    theirs: Any
    anchor: str | None = None
    corrector: str | None = None


def measured(scheduler: Any, solver: Solver, start: int, settings: tuple[tuple[str, Hashable], ...]) -> Measured:
    """The steps from index `start` on, before which nothing is known; equal ones are one object.

    settings   attributes of the scheduler that its steps depend on besides configuration, levels and timesteps
    """
    levels = scheduler.sigmas.cpu().numpy()
    times = tuple(scheduler._times)
    key = (solver, repr(scheduler.config), settings, levels.dtype.str, levels.tobytes(), times, start)
    made = _kept.pop(key, None) or _measure(_Probe(scheduler, solver, start, dict(settings)), scheduler, start)
    _kept[key] = made
    while len(_kept) > KEPT_TABLES:
        _kept.pop(next(iter(_kept)), None)
    return made


@dataclass(frozen=True)
class _Step:
    """One step of theirs in the output q that its solver integrates.

    data         what D is, before it is bounded, in x and the network's output
    q            in x and D
    moved        x' in x_c, the state that the step is taken from, q, the anchor, the history and the noise
    correction   x_c in the anchor, q, the history and the last noise; None: it is x
    keeps        whether x_c is the next anchor
    exact        whether a sum of the terms gives the result, in whatever order it is rounded
    """

    data: Linear
    bounded: bool
    q: Coefficients
    moved: Coefficients
    correction: Coefficients | None
    keeps: bool
    exact: bool

    @property
    def start(self) -> Coefficients:
        """x_c, as the row reads it."""
        if self.correction is None:
            return {"x": 1.0}
        return self._sum({name: value for name, value in self.correction.items() if name != "last_noise"})

    @property
    def end(self) -> Coefficients:
        """x', as the row reads it."""
        rest = {name: value for name, value in self.moved.items() if name != "x"}
        return total((self.moved.get("x", 0.0), self.start), (1.0, self._sum(rest)))

    @property
    def last_noise(self) -> float:
        """What the row wants of it beside 1 of the anchor."""
        wanted = self.correction or {}
        return wanted["last_noise"] / wanted["anchor"] if "last_noise" in wanted else 0.0

    def _sum(self, terms: Coefficients) -> Coefficients:
        return total(*((value, self.q if name == "q" else {name: 1.0}) for name, value in terms.items()))


class _Probe:
    """diffusers' own class in the scheduler's stead, whose state and outputs are unit vectors."""

    def __init__(self, scheduler: Any, solver: Solver, start: int, settings: dict[str, Any]) -> None:
        theirs = solver.theirs
        probe = theirs.__new__(theirs)
        probe.__dict__.update({**vars(scheduler), **settings})
        probe.timesteps, probe.sigmas = scheduler.timesteps, scheduler.sigmas.cpu()
        probe.lower_order_nums, probe._step_index = 0, start
        units = torch.eye(len(_COLUMNS), dtype=torch.float64, device="cpu").unsqueeze(1)
        self._units = dict(zip(_COLUMNS, units, strict=True))
        self.solver, self._probe, self._start = solver, probe, start
        self.times, self._outputs = scheduler._called(), len(scheduler.model_outputs)
        self._correction: Tensor | None = None
        self._generator = torch.Generator()
        self._patched = ["convert_model_output", "_threshold_sample"]
        probe.convert_model_output = lambda *_, **__: self._units["q"]
        for name in dir(theirs):
            if name.endswith("_update"):
                setattr(probe, name, self._with_units(getattr(theirs, name), name == solver.corrector))
                self._patched.append(name)

    def unpatched(self) -> Any:
        """diffusers' own class before its first step, which is its own."""
        probe = copy.copy(self._probe)
        for name in self._patched:
            delattr(probe, name)
        probe._step_index = self._start
        return probe

    def levels(self) -> tuple[Array, Array]:
        """(alpha, sigma) of the points that the steps are between."""
        alphas, sigmas = self.solver.theirs._sigma_to_alpha_sigma_t(self._probe, self._probe.sigmas)
        count = len(self.times) + 1
        return alphas.double().expand(sigmas.shape)[:count].numpy(), sigmas[:count].double().numpy()

    def steps(self) -> tuple[list[_Step], Exception | None]:
        """Every step, or those before the one that cannot be taken, and what that ends in."""
        made: list[_Step] = []
        try:
            while self._probe._step_index < len(self.times):
                made.append(self._step())
        except _FAULTS as fault:
            if not made:
                raise
            return made, fault
        return made, None

    def _step(self) -> _Step:
        probe, units, solver = self._probe, self._units, self.solver
        index = probe._step_index
        known = min(index - self._start, self._outputs, len(HISTORY))
        linear, q, bounded = self._conversion()
        given = [units[name] for name in HISTORY[:known]]
        probe.model_outputs = [*[None] * (self._outputs - known), *reversed(given)]
        if solver.anchor is not None:
            setattr(probe, solver.anchor, units["anchor"] if known else None)
            probe.last_noise = units["last_noise"]
        self._correction = None
        takes = "generator" in solver.theirs.step.__code__.co_varnames
        options = {"generator": self._generator} if takes else {}
        moved = solver.theirs.step(probe, units["q"], self.times[index], units["x"], return_dict=False, **options)[0]
        readable = {"x", "q", "noise", *HISTORY[:known]} | ({"anchor", "last_noise"} if known else set())
        keeps = solver.anchor is not None and getattr(probe, solver.anchor) is units["x"]
        correction = None if self._correction is None else _coefficients(self._correction, readable, "anchor")
        coefficients = _coefficients(moved, readable, "x")
        state, outputs = (max(abs(coefficients.get(name, 0.0)) for name in names) for names in _TERMS)
        exact = (
            state < _MOST_GROWTH and outputs < _MOST_WEIGHT and not (bounded and abs(linear.x) > _MOST_GROWTH_OF_DATA)
        )
        if correction is not None and "anchor" not in correction:
            # There the last noise would have nothing to go with.
            correction, exact = {name: correction[name] for name in correction if name != "last_noise"}, False
        return _Step(linear, bounded, q, coefficients, correction, keeps, exact)

    def _conversion(self) -> tuple[Linear, Coefficients, bool]:
        """D before it is bounded, q in x and D, and whether D is bounded."""
        # Three columns, since of a network with variances theirs takes the first three.
        x, m, data = torch.eye(3, dtype=torch.float64, device="cpu").unsqueeze(1)
        before: list[Tensor] = []

        def threshold(value: Tensor) -> Tensor:
            before.append(value)
            return data

        self._probe._threshold_sample = threshold
        made = self.solver.theirs.convert_model_output(self._probe, m, sample=x)
        x_factor, m_factor, data_factor = made[0].tolist()
        if before:
            return Linear(*before[0][0, :2].tolist()), {"x": x_factor, "D": data_factor}, True
        # (x - sigma m) / alpha: the difference is made first, as theirs is, and so cancels without a loss.
        scale = max(abs(x_factor), 1.0)
        return Linear(x_factor / scale, m_factor / scale), {"D": scale}, False

    def _with_units(self, update: Callable[..., Tensor], corrects: bool) -> Callable[..., Tensor]:
        """An update of theirs with a unit vector for the noise; and for the state that it corrects."""

        def updated(*args: Any, **kwargs: Any) -> Tensor:
            if kwargs.get("noise") is not None:
                kwargs["noise"] = self._units["noise"]
            result = update(self._probe, *args, **kwargs)
            if not corrects:
                return result
            self._correction = result
            return self._units["x"]

        return updated


def _coefficients(vector: Tensor, readable: set[str], start: str) -> Coefficients:
    """Of what can be read; where diffusers divides by zero, the result is NaN, whatever is read."""
    values = dict(zip(_COLUMNS, vector[0].tolist(), strict=True))
    if not all(math.isfinite(value) for value in values.values()):
        return {start: math.nan}
    return {name: value for name, value in values.items() if value != 0.0 and name in readable}


def _measure(probe: _Probe, scheduler: Any, start: int) -> Measured:
    steps, fault = probe.steps()
    end = start + len(steps) + 1
    times = np.array([*scheduler._times, 0.0])[start:end]
    alphas, sigmas = (values[start:end] for values in probe.levels())
    rows = np.stack([_row(step) for step in steps])
    read = {name for i, name in enumerate(INPUTS) if rows[:, [NEW_X.start + i, NEW_ANCHOR.start + i]].any()}
    theirs = frozenset(i for i, step in enumerate(steps) if not step.exact)
    if not theirs and not scheduler._counted() and not read.intersection(HISTORY):
        rows[:, NEW_HISTORY] = 0.0
    if not theirs and "anchor" not in read:
        rows[:, NEW_ANCHOR] = 0.0
    rows[:, KNOWN] = np.stack([alphas[1:], sigmas[1:]], axis=1)
    for array in (rows, times):
        array.flags.writeable = False
    table = StepTable(
        method=type(scheduler).__name__,
        prediction=scheduler.config.prediction_type,
        rows=rows,
        timesteps=times[:-1],
        init_scale=float(scheduler.init_noise_sigma),
        init_level=(float(alphas[0]), float(sigmas[0])),
        first_input_scale=1.0,
        grid=Grid(times, alphas, sigmas, start),
        threshold=threshold_of(scheduler.config) if any(step.bounded for step in steps) else None,
        snr=np.zeros(len(rows)),
    )
    made = Measured(table, fault, theirs, tuple(step.last_noise for step in steps))
    left = rows_left(scheduler, probe.unpatched(), made, probe.times[start : end - 1], np.hypot(alphas, sigmas))
    return replace(made, theirs=theirs.union(range(left)))


def _row(step: _Step) -> Array:
    row = np.zeros(ROW_SIZE)
    row[GUIDANCE] = row[INPUT_SCALE] = 1.0
    row[PREDICTION] = step.data.x, step.data.m
    row[CLIP] = 1.0 if step.bounded else np.inf
    for block, terms in ((NEW_X, step.end), (NEW_HISTORY, step.q), (NEW_ANCHOR, step.start if step.keeps else {})):
        row[block] = [terms.get(name, 0.0) for name in INPUTS]
    return row
