"""DPM-Solver++ in the space of Karras et al. 2022."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.measured import Solver
from fastdiff.integrations.diffusers.multistep import MultistepScheduler
from fastdiff.integrations.diffusers.noising import AddNoise
from fastdiff.integrations.diffusers.scheduler import draw


class EDMDPMSolverMultistepScheduler(AddNoise, MultistepScheduler, diffusers.EDMDPMSolverMultistepScheduler):
    """The steps of `dpmpp_2m`, `dpmpp_3m` or `dpmpp_2m_sde` for the prediction "edm"."""

    _solver = Solver(diffusers.EDMDPMSolverMultistepScheduler)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state at the next timestep, in the common dtype of `sample` and `model_output`."""
        due = self._due(model_output, timestep, sample)
        if due is None:
            return self._left(model_output, timestep, sample, generator, return_dict)
        dtype = due.promoted
        noise = draw(due.model_output, generator, dtype) if self._draws else None
        x = self._move(due, noise=noise, dtype=dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
