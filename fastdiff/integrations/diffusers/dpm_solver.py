"""DPM-Solver and DPM-Solver++."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff import schedules
from fastdiff.integrations.diffusers.scheduler import IndexedScheduler, draw
from fastdiff.integrations.diffusers.tables import PREDICTIONS, levels, schedule_of, table, threshold_of
from fastdiff.samplers.table import StepTable

_SHORT_RUN = 15
"""diffusers lowers the order of the last steps where there are fewer."""

_METHODS = {
    "dpmsolver++": ("dpmpp_2m", "dpmpp_3m"),
    "sde-dpmsolver++": ("dpmpp_2m_sde", "dpmpp_3m_sde"),
    "dpmsolver": ("dpm_solver", "dpm_solver"),
    "sde-dpmsolver": ("dpm_solver_sde", "dpm_solver_sde"),
}


class DPMSolverMultistepScheduler(IndexedScheduler, diffusers.DPMSolverMultistepScheduler):
    """Rows of `dpmpp_2m`, `dpmpp_3m`, `dpm_solver` or the SDE form of each, as the configuration says."""

    def _memory(self) -> int:
        return int(self.config.solver_order)

    def _table(self, start: int) -> tuple[StepTable, bool]:
        config = self.config
        flow = config.use_flow_sigmas
        alphas, sigmas = levels(self.sigmas, flow=flow)
        method, options = self._method()
        made = table(
            method,
            schedule=schedules.flow(config.num_train_timesteps) if flow else schedule_of(self.alphas_cumprod),
            prediction=PREDICTIONS[config.prediction_type],
            timesteps=self._times[start:],
            alphas=alphas[start:],
            sigmas=sigmas[start:],
            clip=1.0 if config.thresholding else None,
            threshold=threshold_of(config),
            skipped=start,
            options=options,
        )
        return made, False

    def _method(self) -> tuple[str, dict[str, Any]]:
        config, order = self.config, self.config.solver_order
        method = _METHODS[config.algorithm_type][order == 3]
        options: dict[str, Any] = {
            "solver": config.solver_type,
            "lower_order_final": config.lower_order_final and len(self._timesteps) < _SHORT_RUN,
            "euler_at_final": config.euler_at_final,
        }
        if not method.startswith("dpmpp_3m"):
            options["order"] = order
        if order == 3:
            options["curvature"] = "half_offset" if method == "dpmpp_3m_sde" else "half"
        return method, options

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state at the next timestep, in the dtype of `model_output`."""
        if self.num_inference_steps is None:
            raise ValueError("step: expected a scheduler with timesteps, got none; call set_timesteps first")
        run, row = self._at(timestep)
        noise = None
        if self.config.algorithm_type.startswith("sde"):
            noise = draw(model_output, generator, torch.float32) if variance_noise is None else variance_noise
        x, _ = self._apply(run, row, sample, model_output, noise=noise, dtype=model_output.dtype)
        self._advance()
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
