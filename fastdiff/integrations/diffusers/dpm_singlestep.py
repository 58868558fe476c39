"""DPM-Solver and DPM-Solver++, singlestep."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.measured import Solver
from fastdiff.integrations.diffusers.multistep import MultistepScheduler
from fastdiff.integrations.diffusers.noising import AddNoise
from fastdiff.integrations.diffusers.scheduler import draw


class DPMSolverSinglestepScheduler(AddNoise, MultistepScheduler, diffusers.DPMSolverSinglestepScheduler):
    """The steps of `dpm_solver_singlestep` or `dpmpp_singlestep`, with the inner points on the grid."""

    _form = "vp"
    _solver = Solver(diffusers.DPMSolverSinglestepScheduler, anchor="sample")
    order_list: list[int]

    def _memory(self) -> int:
        return len(self.model_outputs) - 1

    def _taken(self) -> int:
        return sum(output is not None for output in self.model_outputs[1:])

    def _counted(self) -> int:
        return self._memory()

    def _settings(self) -> tuple[tuple[str, Hashable], ...]:
        return (("order_list", tuple(self.order_list)),)

    def _advance(self) -> None:
        assert self._step_index is not None
        self._step_index += 1

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
