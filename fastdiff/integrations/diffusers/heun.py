"""Heun's method."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HeunDiscreteScheduler as Theirs
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteSchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.scheduler import Run
from fastdiff.integrations.diffusers.sigma_space import result_dtype
from fastdiff.integrations.diffusers.tables import DataSlot, data_slot, on_both_inputs
from fastdiff.integrations.diffusers.two_calls import TwoCallScheduler
from fastdiff.samplers.table import StepTable


class HeunDiscreteScheduler(TwoCallScheduler, Theirs):
    """Rows of `heun`."""

    sample: Tensor | None
    _slope: Any = None
    """`prev_derivative`, or the (y, D, index) that make it."""
    _dt: Any = None
    """`dt`, or the index of the first call that it is of."""
    _slot: DataSlot = None

    @property
    def state_in_first_order(self) -> bool:  # type: ignore[override]
        return self._dt is None

    @property
    def dt(self) -> Any:
        """sigma' - sigma of a step while its second call is due; no step of ours reads it."""
        if isinstance(self._dt, int):
            self._dt = self.sigmas[self._dt + 1] - self.sigmas[self._dt]
        return self._dt

    @dt.setter
    def dt(self, value: Any) -> None:
        self._dt = value

    @property
    def prev_derivative(self) -> Any:
        """(y - D) / sigma of a step's first call while the second is due; no step of ours reads it."""
        if isinstance(self._slope, tuple):
            y, data, index = self._slope
            self._slope = (y - data) / self.sigmas[index]
        return self._slope

    @prev_derivative.setter
    def prev_derivative(self, value: Any) -> None:
        self._slope = value

    def _table(self, start: int) -> tuple[StepTable, bool]:
        config = self.config
        clip = config.clip_sample_range if config.clip_sample else None
        made, gives_data = self._rows("heun", sigmas=self._ends, times=self._times[::2], clip=clip)
        self._slot = data_slot(made) if gives_data else None
        return on_both_inputs(made, "D"), gives_data

    def _begin(self, index: int) -> Run:
        run = super()._begin(index)
        # D goes to the caller, and is history as well.
        run.data = self._slot
        return run

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> HeunDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """The state at the next timestep, and the data prediction."""
        due = self._due(timestep, sample, model_output)
        if due is None:
            return Theirs.step(self, model_output, timestep, sample, return_dict)
        run, row = due
        dtype = result_dtype(sample, model_output)
        x, denoised = self._apply(run, row, sample, model_output, dtype=dtype)
        data = model_output
        if denoised is None:
            denoised = model_output.to(torch.promote_types(model_output.dtype, torch.float32)).contiguous()
        else:
            kind = model_output.dtype if run.table.prediction == "sample" else dtype
            data = denoised if denoised.dtype is kind else denoised.to(kind)
        if row % 2:
            self._slope = self._dt = self.sample = run.anchor = None
            run.history = ()
        else:
            self._slope, self._dt, self.sample = (sample, data, row), row, sample
            run.history = (denoised,)
        self._step_index += 1
        return HeunDiscreteSchedulerOutput(x, data) if return_dict else (x, data)
