"""Euler and Euler ancestral."""

from __future__ import annotations

import math
from typing import Any

from diffusers import EulerAncestralDiscreteScheduler as TheirAncestral
from diffusers import EulerDiscreteScheduler as Theirs
from diffusers.schedulers import scheduling_euler_ancestral_discrete, scheduling_euler_discrete
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteSchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.noising import AddNoise
from fastdiff.integrations.diffusers.scheduler import draw, refuse_index
from fastdiff.integrations.diffusers.sigma_space import ChurnScheduler, SigmaScheduler
from fastdiff.samplers.table import StepTable

UNSCALED = "step: scale_model_input was not called before it, so the network was given an input of another size"


class EulerDiscreteScheduler(AddNoise, ChurnScheduler, Theirs):
    """Rows of `euler`, with churn whose network call comes before the noise."""

    def _table(self, start: int) -> tuple[StepTable, bool]:
        return self._rows("euler", sigmas=self.sigmas, times=self._times, options=self._churn_options())

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> EulerDiscreteSchedulerOutput | tuple[Tensor, Tensor | None]:
        """The state at the next timestep, in the dtype of `model_output`, and the data prediction."""
        refuse_index(timestep)
        if not self.is_scale_input_called:
            scheduling_euler_discrete.logger.warning(UNSCALED)
        churn = (s_churn, s_tmin, s_tmax, s_noise)
        if sample.shape != model_output.shape or not self._takes(churn):
            return Theirs.step(self, model_output, timestep, sample, *churn, generator, return_dict)
        run, row = self._at(timestep)
        if row in self._theirs and self._leaves(row, model_output):
            return self._leave(model_output, timestep, sample, *churn, generator, return_dict)
        noise = draw(model_output, generator) if self._raised[row] else None
        x, data = self._apply(run, row, sample, model_output, noise=noise, dtype=model_output.dtype)
        self._step_index += 1
        if data is None:
            data = model_output
        return EulerDiscreteSchedulerOutput(x, data) if return_dict else (x, data)


class EulerAncestralDiscreteScheduler(AddNoise, SigmaScheduler, TheirAncestral):
    """Rows of `euler_ancestral`."""

    unfinished = ("sample",)

    def _table(self, start: int) -> tuple[StepTable, bool]:
        return self._rows("euler_ancestral", sigmas=self.sigmas, times=self._times)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> EulerAncestralDiscreteSchedulerOutput | tuple[Tensor, Tensor | None]:
        """The state at the next timestep, in the dtype of `model_output`, and the data prediction."""
        refuse_index(timestep)
        if not self.is_scale_input_called:
            scheduling_euler_ancestral_discrete.logger.warning(UNSCALED)
        if sample.shape != model_output.shape:
            return TheirAncestral.step(self, model_output, timestep, sample, generator, return_dict)
        run, row = self._at(timestep)
        if row in self._theirs and self._leaves(row, model_output):
            return TheirAncestral.step(self, model_output, timestep, sample, generator, return_dict)
        noise = draw(model_output, generator)
        x, data = self._apply(run, row, sample, model_output, noise=noise, dtype=model_output.dtype)
        self._step_index += 1
        return EulerAncestralDiscreteSchedulerOutput(x, data) if return_dict else (x, data)
