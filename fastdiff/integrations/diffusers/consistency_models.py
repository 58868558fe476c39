"""Consistency models."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_consistency_models import CMStochasticIterativeSchedulerOutput
from diffusers.utils import logging
from torch import Tensor

from fastdiff import schedules
from fastdiff.integrations.diffusers.noising import AddNoise
from fastdiff.integrations.diffusers.scheduler import IndexedScheduler, draw, refuse_index
from fastdiff.integrations.diffusers.tables import table
from fastdiff.samplers.table import StepTable
from fastdiff.schedules import Schedule

_logger = logging.get_logger(__name__)
_TIMESTEP_SCALE = 1000.0


class CMStochasticIterativeScheduler(AddNoise, IndexedScheduler, diffusers.CMStochasticIterativeScheduler):
    """Rows of `consistency`, whose function is the identity at sigma_min."""

    is_scale_input_called: bool

    def _table(self, start: int) -> tuple[StepTable, bool]:
        config, sigmas = self.config, self._sigma_values[start:]
        if len(self._sigma_values) == len(self._times):
            # Before `set_timesteps` no level ends the last step.
            sigmas = [*sigmas, sigmas[-1]]
        made = table(
            "consistency",
            schedule=_edm(config.num_train_timesteps, config.sigma_min, config.sigma_max, config.sigma_data),
            prediction="edm",
            timesteps=self._times[start:],
            alphas=np.ones(len(sigmas)),
            sigmas=np.array(sigmas),
            clip=1.0 if config.clip_denoised else None,
            skipped=start,
            options={"s_noise": config.s_noise if len(self._times) > 1 else 0.0},
        )
        return made, False

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor) -> Tensor:
        """x / sqrt(sigma^2 + sigma_data^2)."""
        if self._step_index is None:
            self._init_step_index(timestep)
        assert self._step_index is not None
        self.is_scale_input_called = True
        return sample / math.hypot(self._sigma_values[self._step_index], self.config.sigma_data)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> CMStochasticIterativeSchedulerOutput | tuple[Tensor]:
        """The state at the next level; noise is drawn in every step of a run that has more than one."""
        refuse_index(timestep)
        if not self.is_scale_input_called:
            _logger.warning("step: the network's input is expected to come from `scale_model_input`; call it first")
        if sample.shape != model_output.shape:
            return super().step(model_output, timestep, sample, generator, return_dict)  # type: ignore[misc]
        run, row = self._at(timestep)
        noise = draw(model_output, generator) if len(self._times) > 1 else None
        dtype = torch.promote_types(sample.dtype, model_output.dtype)
        x, _ = self._apply(run, row, sample, model_output, noise=noise, dtype=dtype)
        self._advance()
        return CMStochasticIterativeSchedulerOutput(prev_sample=x) if return_dict else (x,)


@lru_cache(maxsize=16)
def _edm(steps: int, sigma_min: float, sigma_max: float, sigma_data: float) -> Schedule:
    """Equal ones are one object, so that tables are shared."""
    ends = {"sigma_min": sigma_min, "sigma_max": sigma_max}
    return schedules.edm(steps, **ends, sigma_data=sigma_data, timestep_scale=_TIMESTEP_SCALE)
