"""The midpoint method of k-diffusion, and its ancestral form."""

from __future__ import annotations

import math
from typing import Any

from diffusers import KDPM2AncestralDiscreteScheduler as TheirAncestral
from diffusers import KDPM2DiscreteScheduler as Theirs
from diffusers.schedulers.scheduling_k_dpm_2_ancestral_discrete import KDPM2AncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_k_dpm_2_discrete import KDPM2DiscreteSchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.scheduler import draw
from fastdiff.integrations.diffusers.sigma_space import result_dtype
from fastdiff.integrations.diffusers.two_calls import TwoCallScheduler
from fastdiff.samplers.table import StepTable


class KDPM2DiscreteScheduler(TwoCallScheduler, Theirs):
    """Rows of `dpm2`, the inner points where diffusers has them."""

    unfinished = ("sample",)
    sample: Tensor | None
    sigmas_interpol: Tensor

    def _table(self, start: int) -> tuple[StepTable, bool]:
        middles = tuple(self.sigmas_interpol[1::2].tolist())
        return self._rows("dpm2", sigmas=self._ends, times=self._times[::2], options={"middles": middles})

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> KDPM2DiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """The state at the next timestep, and the data prediction."""
        due = self._due(timestep, sample, model_output)
        if due is None:
            return Theirs.step(self, model_output, timestep, sample, return_dict)
        run, row = due
        dtype = result_dtype(sample, model_output)
        x, data = self._apply(run, row, sample, model_output, dtype=dtype)
        assert data is not None
        data = data if data.dtype is dtype else data.to(dtype)
        self.sample = None if row % 2 else sample
        self._step_index += 1
        return KDPM2DiscreteSchedulerOutput(x, data) if return_dict else (x, data)


class KDPM2AncestralDiscreteScheduler(TwoCallScheduler, TheirAncestral):
    """Rows of `dpm2_ancestral`, the levels of a step those that diffusers has."""

    unfinished = ("sample",)
    sample: Tensor | None
    sigmas_interpol: Tensor
    sigmas_down: Tensor
    sigmas_up: Tensor
    _stepped: int | None = None
    _dt: Any = None

    @property
    def dt(self) -> Any:
        """Of the latest first call, which diffusers leaves there."""
        if self._stepped is not None:
            self._dt, self._stepped = self.sigmas_interpol[self._stepped] - self.sigmas[self._stepped], None
        return self._dt

    @dt.setter
    def dt(self, value: Any) -> None:
        self._dt, self._stepped = value, None

    def _table(self, start: int) -> tuple[StepTable, bool]:
        arrays = (self.sigmas_interpol, self.sigmas_down, self.sigmas_up)
        found = zip(*(array[::2].tolist() for array in arrays), strict=True)
        # Where diffusers' rounding has left nothing of a level, only its formula is left to follow.
        levels = tuple(each if min(each) > 0.0 and all(map(math.isfinite, each)) else None for each in found)
        return self._rows("dpm2_ancestral", sigmas=self._ends, times=self._times[::2], options={"levels": levels})

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> KDPM2AncestralDiscreteSchedulerOutput | tuple[Tensor, Tensor]:
        """The state at the next timestep, and the data prediction."""
        due = self._due(timestep, sample, model_output)
        if due is None:
            return TheirAncestral.step(self, model_output, timestep, sample, generator, return_dict)
        run, row = due
        noise = draw(model_output, generator) if row % 2 else None
        dtype = result_dtype(sample, model_output)
        x, data = self._apply(run, row, sample, model_output, noise=noise, dtype=dtype)
        assert data is not None
        data = data if data.dtype is dtype else data.to(dtype)
        if row % 2:
            self.sample = None
        else:
            self.sample, self._stepped = sample, row
        self._step_index += 1
        return KDPM2AncestralDiscreteSchedulerOutput(x, data) if return_dict else (x, data)
