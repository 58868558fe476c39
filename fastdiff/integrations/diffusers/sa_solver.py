"""SA-Solver."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.alphas_cumprod import Noising
from fastdiff.integrations.diffusers.measured import Solver
from fastdiff.integrations.diffusers.multistep import MultistepScheduler
from fastdiff.integrations.diffusers.scheduler import draw


@dataclass(frozen=True)
class _Taus:
    """A `tau_func` that is known by its values: equal where they are."""

    times: tuple[float, ...]
    numbers: tuple[float, ...]
    values: tuple[Any, ...] = field(compare=False)
    source: Callable[[Any], Any] = field(compare=False)

    def __call__(self, timestep: float) -> Any:
        return self.values[self.times.index(timestep)]


class SASolverScheduler(Noising, MultistepScheduler, diffusers.SASolverScheduler):
    """The steps of `sa_solver`.

    Where terms cancel ("noise_prediction", thresholding of what follows from epsilon) the steps are diffusers' own.
    """

    _solver = Solver(
        diffusers.SASolverScheduler, anchor="last_sample", corrector="stochastic_adams_moulton_update", mixes=False
    )
    _taus: _Taus | None = None
    last_noise: Tensor
    predict_x0: bool
    tau_func: Callable[[Any], Any]

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """diffusers' own; `tau_func` is asked here, since it may compare the timesteps that it is given."""
        self._solver.theirs.set_timesteps(self, num_inference_steps, device)
        self._taus = self._ask()

    def _ask(self) -> _Taus:
        values = tuple(self.tau_func(timestep) for timestep in self.timesteps.cpu())
        return _Taus(tuple(self._times), tuple(float(value) for value in values), values, self.tau_func)

    def _settings(self) -> tuple[tuple[str, Hashable], ...]:
        taus = self._taus
        if taus is None or taus.source is not self.tau_func or taus.times != tuple(self._times):
            taus = self._ask()
        return (("tau_func", taus),)

    def _look(self) -> None:
        super()._look()
        # With variances diffusers draws noise that does not fit its state: its step raises an error.
        cancels = (self.config.thresholding and self.config.prediction_type == "epsilon") or not self.predict_x0
        self._measured = self._measured and not (cancels or self._first_three)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state at the next timestep, in the dtype of `sample`."""
        due = self._due(model_output, timestep, sample)
        if due is None:
            return self._left(model_output, timestep, sample, generator, return_dict)
        self.last_noise = draw(due.model_output, generator)
        x = self._move(due, noise=self.last_noise, dtype=sample.dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
