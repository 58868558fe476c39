"""Euler for networks with EDM's preconditioning."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from diffusers import EDMEulerScheduler as Theirs
from diffusers.schedulers import scheduling_edm_euler
from diffusers.schedulers.scheduling_edm_euler import EDMEulerSchedulerOutput
from torch import Tensor

from fastdiff import schedules
from fastdiff.integrations.diffusers.euler import UNSCALED
from fastdiff.integrations.diffusers.noising import AddNoise
from fastdiff.integrations.diffusers.scheduler import draw, refuse_index
from fastdiff.integrations.diffusers.sigma_space import ChurnScheduler
from fastdiff.integrations.diffusers.tables import negated, table
from fastdiff.samplers.table import StepTable
from fastdiff.schedules import Schedule


class EDMEulerScheduler(AddNoise, ChurnScheduler, Theirs):
    """Rows of `euler` for the prediction "edm", with churn whose network call comes before the noise."""

    _given: bool = False
    """Whether the table takes the data prediction in place of the network's output."""

    def _table(self, start: int) -> tuple[StepTable, bool]:
        kind = self.config.prediction_type
        if not self._given and kind not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type: expected 'epsilon' or 'v_prediction', got {kind!r}")
        levels = self.sigmas.double().cpu().numpy()
        made = table(
            "euler",
            schedule=_edm(self.config.sigma_data),
            prediction="sample" if self._given else "edm",
            timesteps=self._times,
            alphas=np.ones_like(levels),
            sigmas=levels,
            gives_data=not self._given,
            options=self._churn_options(),
        )
        # Both are F of x_0 = c_skip x + c_out F; the second has the other sign.
        negative = kind == "v_prediction" and not self._given
        return (negated(made) if negative else made), not self._given

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
        pred_original_sample: Tensor | None = None,
    ) -> EDMEulerSchedulerOutput | tuple[Tensor, Tensor | None]:
        """The state at the next timestep, in the dtype of `model_output`, and the data prediction: the given one, or
        that of the network."""
        refuse_index(timestep)
        if not self.is_scale_input_called:
            scheduling_edm_euler.logger.warning(UNSCALED)
        churn, given = (s_churn, s_tmin, s_tmax, s_noise), pred_original_sample is not None
        output = model_output if pred_original_sample is None else pred_original_sample
        if not sample.shape == output.shape == model_output.shape or not self._takes(churn):
            return Theirs.step(
                self, model_output, timestep, sample, *churn, generator, return_dict, pred_original_sample
            )
        if given != self._given:
            self._given, self._run = given, None
        run, row = self._at(timestep)
        if row in self._theirs and self._leaves(row, output):
            return self._leave(model_output, timestep, sample, *churn, generator, return_dict, pred_original_sample)
        noise = draw(model_output, generator) if self._raised[row] else None
        x, data = self._apply(run, row, sample, output, noise=noise, dtype=model_output.dtype)
        self._step_index += 1
        if data is None:
            data = output
        return EDMEulerSchedulerOutput(x, data) if return_dict else (x, data)


@lru_cache(maxsize=8)
def _edm(sigma_data: float) -> Schedule:
    return schedules.edm(sigma_data=sigma_data)
