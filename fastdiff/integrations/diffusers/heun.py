"""Heun's method."""

from __future__ import annotations

from typing import Any

from diffusers import HeunDiscreteScheduler as Theirs
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.sigma_space import result_dtype
from fastdiff.integrations.diffusers.two_calls import TwoCallScheduler
from fastdiff.samplers.table import StepTable


class HeunDiscreteScheduler(TwoCallScheduler, Theirs):
    """Rows of `heun`."""

    dt: Any
    sample: Tensor | None
    _levels: list[float]
    _slope: Any = None
    """`prev_derivative`, or the (y, z, factor) that make it: (y - z) * factor."""

    @property
    def prev_derivative(self) -> Any:
        """(y - D) / sigma of a step's first call while the second is due; no step of ours reads it."""
        if isinstance(self._slope, tuple):
            y, other, factor = self._slope
            self._slope = ((y - other) * factor).to(y.dtype)
        return self._slope

    @prev_derivative.setter
    def prev_derivative(self, value: Any) -> None:
        self._slope = value

    def _table(self, start: int) -> tuple[StepTable, bool]:
        config = self.config
        clip = config.clip_sample_range if config.clip_sample else None
        self._levels = self.sigmas.tolist()
        return self._rows("heun", sigmas=self._ends, times=self._times[::2], clip=clip)

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> HeunDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """The state at the next timestep, and the data prediction."""
        due = self._due(timestep, sample, model_output)
        if due is None:
            return Theirs.step(self, model_output, timestep, sample, return_dict)
        run, row = due
        dtype = result_dtype(sample, model_output)
        x, data = self._apply(run, row, sample, model_output, dtype=dtype)
        if data is None:
            data = model_output
        else:
            kind = model_output.dtype if run.table.prediction == "sample" else dtype
            data = data if data.dtype is kind else data.to(kind)
        if row % 2:
            self._slope = self.dt = self.sample = run.anchor = None
        else:
            sigma, end = self._levels[row], self._levels[row + 1]
            self.dt = dt = end - sigma
            self.sample = sample
            # The anchor is halfway along the slope, so that the second call keeps no third tensor.
            self._slope = (sample, data, 1.0 / sigma) if run.anchor is None else (sample, run.anchor, -2.0 / dt)
        self._step_index += 1
        return HeunDiscreteSchedulerOutput(x, data) if return_dict else (x, data)
