"""The linear multistep method of k-diffusion."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from diffusers import LMSDiscreteScheduler as Theirs
from diffusers.schedulers.scheduling_lms_discrete import LMSDiscreteSchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.euler import UNSCALED
from fastdiff.integrations.diffusers.noising import AddNoise
from fastdiff.integrations.diffusers.scheduler import Run
from fastdiff.integrations.diffusers.sigma_space import SigmaScheduler, history_of, result_dtype
from fastdiff.ops.row import INPUTS, NEW_X
from fastdiff.samplers.lms import MOST_SLOPE_ROUNDING, quadrature, slope_rounding
from fastdiff.samplers.table import StepTable

_MOST_SLOPES = 4
_MOST_TERMS = 8.0
_WIDE = (torch.float32, torch.float64)


class LMSDiscreteScheduler(AddNoise, SigmaScheduler, Theirs):
    """Rows of `lms`, which every step may have another order of.

    `derivatives`, oldest first, is what the rows read; they are float32.
    """

    derivatives: list[Tensor]
    _order: int = _MOST_SLOPES
    _cancelling: frozenset[int] = frozenset()
    """Rows left to diffusers too, but for half precision: what they multiply is less than what it rounds there."""

    def _table(self, start: int) -> tuple[StepTable, bool]:
        options = {"order": self._order, "slopes": "all", "integrals": self._precision()}
        return self._rows("lms", sigmas=self.sigmas, times=self._times, options=options)

    def _precision(self) -> str:
        return str(self._sigmas.dtype).removeprefix("torch.")

    def get_lms_coefficient(self, order: int, t: int, current_order: int) -> float:
        """The weight of a slope, integrated as diffusers does it, but once."""
        sigmas = self._sigma_values
        nodes = tuple(sigmas[t - k] for k in range(order))
        return quadrature(nodes, sigmas[t + 1], current_order, self._precision())

    def _begin(self, index: int) -> Run:
        run = super()._begin(index)
        undefined = frozenset(row for row in range(len(run.table)) if self._undefined(row))
        self._theirs |= self._with_slopes(undefined)
        self._cancelling = self._with_slopes(self._multiplying(run.table, undefined))
        return run

    def _with_slopes(self, rows: Iterable[int]) -> frozenset[int]:
        """Those rows and the ones whose slopes they read, of which the rounding is multiplied."""
        return frozenset(near for row in rows for near in range(max(row - self._order + 1, 0), row + 1))

    def _undefined(self, row: int) -> bool:
        """Whether diffusers divides by 0 there."""
        near = self._sigma_values[max(row - self._order + 1, 0) : row + 2]
        return len(set(near)) < len(near) or 0.0 in near[:-1]

    def _multiplies(self, run: Run, row: int) -> bool:
        """Whether it is one of those rows, or weights do not fit the slopes: a run from the middle lacks earlier ones,
        which may take the state far off."""
        return row in self._cancelling or len(self.derivatives) < run.table.uses[row].history

    def _multiplying(self, table: StepTable, undefined: frozenset[int]) -> Iterator[int]:
        """Rows that multiply what diffusers rounds: those whose terms are large beside the state that they make, and
        the last one of a network that may predict no data at all."""
        sigmas, precision = self._sigma_values, self._precision()
        for row, weights in enumerate(np.abs(table.rows[:, NEW_X])):
            if row in undefined:
                continue
            start, end = (math.hypot(1.0, level) for level in sigmas[row : row + 2])
            x, other = float(weights[INPUTS.index("x")]), float(weights.sum())
            if (
                (sigmas[row + 1] == 0.0 and table.prediction == "sample")
                or not x * start + other - x < _MOST_TERMS * end
                or not slope_rounding(sigmas, row, self._order, precision) < MOST_SLOPE_ROUNDING
            ):
                yield row

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        order: int = _MOST_SLOPES,
        return_dict: bool = True,
    ) -> LMSDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """The state at the next timestep, and the data prediction."""
        if not self.is_scale_input_called:
            warnings.warn(UNSCALED, stacklevel=2)
        if sample.shape != model_output.shape or not 1 <= order <= _MOST_SLOPES:
            return Theirs.step(self, model_output, timestep, sample, order, return_dict)
        if order != self._order:
            self._order, self._run = order, None
        run, row = self._at(timestep)
        dtype = result_dtype(sample, model_output)
        if row in self._theirs or (dtype in _WIDE and self._multiplies(run, row)):
            # As diffusers itself would have kept them.
            self.derivatives = [slope.to(dtype) for slope in self.derivatives]
            return self._leave(model_output, timestep, sample, order, return_dict)
        run.history = history_of(self.derivatives, run.table.uses[row].history, sample)
        x, data = self._apply(run, row, sample, model_output, dtype=dtype)
        data = model_output if data is None else data.to(dtype)
        self.derivatives.append(run.history[0])
        if len(self.derivatives) > order:
            self.derivatives.pop(0)
        run.history = ()
        self._step_index += 1
        return LMSDiscreteSchedulerOutput(x, data) if return_dict else (x, data)
