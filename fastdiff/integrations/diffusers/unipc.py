"""UniPC."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.measured import Solver
from fastdiff.integrations.diffusers.multistep import MultistepScheduler
from fastdiff.integrations.diffusers.noising import AddNoise


class UniPCMultistepScheduler(AddNoise, MultistepScheduler, diffusers.UniPCMultistepScheduler):
    """The steps of `unipc`.

    With another scheduler as `solver_p` the steps are diffusers' own.
    """

    _form = "vp"
    _solver = Solver(diffusers.UniPCMultistepScheduler, anchor="last_sample", corrector="multistep_uni_c_bh_update")
    disable_corrector: list[int]
    predict_x0: bool
    solver_p: Any
    this_order: int
    _lowers = False

    def _settings(self) -> tuple[tuple[str, Hashable], ...]:
        return (("disable_corrector", tuple(self.disable_corrector)),)

    def _look(self) -> None:
        super()._look()
        self._measured = self._measured and not self.solver_p
        self._lowers = self.config.lower_order_final

    def _advance(self) -> None:
        assert self._step_index is not None
        order, left = len(self.model_outputs), len(self._times) - self._step_index
        # A step that is left to diffusers corrects the last one by its order.
        self.this_order = min(order, self.lower_order_nums + 1, left if self._lowers else order)
        super()._advance()

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state at the next timestep, in the dtype of `sample`."""
        due = self._due(model_output, timestep, sample)
        if due is None:
            return self._left(model_output, timestep, sample, return_dict)
        x = self._move(due, dtype=sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
