"""Improved PNDM."""

from __future__ import annotations

from typing import Any

from diffusers import IPNDMScheduler as Theirs
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.scheduler import IndexedScheduler, Run
from fastdiff.integrations.diffusers.sigma_space import SPACE, history_of, result_dtype
from fastdiff.integrations.diffusers.tables import table
from fastdiff.samplers.table import StepTable

_EARLIER = 3
"""Noise predictions that a step reads besides its own."""


class IPNDMScheduler(IndexedScheduler, Theirs):
    """Rows of `ipndm`. `ets`, oldest first, is what the rows read: the newest four, in float32."""

    ets: list[Tensor]
    betas: Tensor
    alphas: Tensor
    _step_index: Any
    _earlier: int = 0
    """How many of `ets` there were before the run's first row."""

    def _table(self, start: int) -> tuple[StepTable, bool]:
        alphas, sigmas = (levels[start:].double().cpu().numpy() for levels in (self.alphas, self.betas))
        made = table(
            "ipndm",
            schedule=SPACE,
            prediction="v",
            timesteps=self._times[start:],
            alphas=alphas,
            sigmas=sigmas,
            options={
                "lower_order_final": False,
                "first_data": False,
                "earlier": self._earlier,
                "slopes": "all",
            },
        )
        return made, False

    def _at(self, timestep: Any) -> tuple[Run, int]:
        if self._step_index is None:
            self._init_step_index(timestep)
        run, index, earlier = self._run, self._step_index, min(len(self.ets), _EARLIER)
        if run is None or run.levels is not self.betas or not self._continues(run, index, earlier):
            self._earlier = earlier
            made, _ = self._table(index)
            self._run = run = Run(made, start=index, levels=self.betas, data=None)
        return run, index - run.start

    def _continues(self, run: Run, index: int, earlier: int) -> bool:
        """Whether the run's row of this index reads as many earlier predictions as there are."""
        return index >= run.start and min(index - run.start + self._earlier, _EARLIER) == earlier

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state at the next timestep."""
        if self.num_inference_steps is None:
            raise ValueError("step: expected a scheduler with timesteps, got none; call set_timesteps first")
        if sample.shape != model_output.shape:
            return Theirs.step(self, model_output, timestep, sample, return_dict)
        run, row = self._at(timestep)
        run.history = history_of(self.ets, run.table.uses[row].history, sample)
        x, _ = self._apply(run, row, sample, model_output, dtype=result_dtype(sample, model_output))
        self.ets = [*self.ets[-_EARLIER:], run.history[0]]
        run.history = ()
        self._step_index += 1
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
