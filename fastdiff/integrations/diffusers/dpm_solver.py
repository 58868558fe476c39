"""DPM-Solver and DPM-Solver++, multistep, forwards and backwards."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.measured import Solver
from fastdiff.integrations.diffusers.multistep import MultistepScheduler
from fastdiff.integrations.diffusers.noising import AddNoise
from fastdiff.integrations.diffusers.scheduler import draw


class DPMSolverMultistepScheduler(AddNoise, MultistepScheduler, diffusers.DPMSolverMultistepScheduler):
    """The steps of `dpmpp_2m`, `dpmpp_3m`, `dpm_solver` or the SDE form of each, as the configuration says."""

    _form = "vp"
    _solver = Solver(diffusers.DPMSolverMultistepScheduler)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state at the next timestep, in the dtype of the converted `model_output`."""
        due = self._due(model_output, timestep, sample)
        if due is None:
            return self._left(model_output, timestep, sample, generator, variance_noise, return_dict)
        noise = None
        if self._draws:
            given = draw(due.model_output, generator, torch.float32) if variance_noise is None else variance_noise
            noise = given.to(device=sample.device, dtype=torch.float32)
        x = self._move(due, noise=noise)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)


class DPMSolverMultistepInverseScheduler(MultistepScheduler, diffusers.DPMSolverMultistepInverseScheduler):
    """The steps of `dpmpp_inverse`; or those of the other methods of DPM-Solver along rising levels."""

    _solver = Solver(diffusers.DPMSolverMultistepInverseScheduler)
    _begin_index = None

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state at the next timestep, in the common dtype of `sample` and `model_output`."""
        due = self._due(model_output, timestep, sample)
        if due is None:
            return self._left(model_output, timestep, sample, generator, variance_noise, return_dict)
        dtype, noise = due.promoted, None
        if self._draws:
            noise = draw(due.model_output, generator, dtype) if variance_noise is None else variance_noise
        x = self._move(due, noise=noise, dtype=dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
