"""DEIS."""

from __future__ import annotations

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.measured import Solver
from fastdiff.integrations.diffusers.multistep import MultistepScheduler
from fastdiff.integrations.diffusers.noising import AddNoise


class DEISMultistepScheduler(AddNoise, MultistepScheduler, diffusers.DEISMultistepScheduler):
    """The steps of `deis`."""

    _form = "vp"
    _solver = Solver(diffusers.DEISMultistepScheduler)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state at the next timestep, in the common dtype of `sample` and `model_output`."""
        due = self._due(model_output, timestep, sample)
        if due is None:
            return self._left(model_output, timestep, sample, return_dict)
        x = self._move(due, dtype=due.promoted)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
