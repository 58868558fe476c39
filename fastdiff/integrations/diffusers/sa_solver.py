"""SA-Solver."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
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
    """The steps of `sa_solver`."""

    _solver = Solver(diffusers.SASolverScheduler, anchor="last_sample", corrector="stochastic_adams_moulton_update")
    _taus: _Taus | None = None
    _corrector, _lowers = 1, False
    _late = 0
    """How far the index of a step lies behind the timestep that it is called with, in a run that starts at the second
    of two equal ones: diffusers asks `tau_func` by the timestep."""
    last_noise: Tensor
    last_sample: Tensor
    timestep_list: list[Any]
    this_corrector_order: int
    tau_func: Callable[[Any], Any]

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None) -> None:
        """diffusers' own; `tau_func` is asked here, since it may compare the timesteps that it is given."""
        self._solver.theirs.set_timesteps(self, num_inference_steps, device)
        self._taus = self._ask()

    def _ask(self) -> _Taus:
        values = tuple(self.tau_func(timestep) for timestep in self.timesteps.cpu())
        return _Taus(tuple(self._times), tuple(float(value) for value in values), values, self.tau_func)

    def _init_step_index(self, timestep: Any) -> None:
        super()._init_step_index(timestep)
        index, position = self._step_index, self._position(timestep)
        assert index is not None
        if position is None:
            time = self._time(timestep)
            position = self._times.index(time) if time in self._times else index
        self._late = index - position if self._begin_index is None else 0

    def _called(self) -> Sequence[float]:
        late, times = self._late, self._times
        last = len(times) - 1
        return [times[min(max(index - late, 0), last)] for index in range(len(times))] if late else times

    def _settings(self) -> tuple[tuple[str, Hashable], ...]:
        taus = self._taus
        if taus is None or taus.source is not self.tau_func or taus.times != tuple(self._times):
            taus = self._ask()
        return ("tau_func", taus), ("_late", self._late)

    def _look(self) -> None:
        super()._look()
        # With variances diffusers draws noise that does not fit its state: its step raises an error.
        self._measured = self._measured and not self._first_three
        self._corrector, self._lowers = self.config.corrector_order, self.config.lower_order_final

    def _read_anchor(self, row: int) -> Tensor:
        share = self._steps.last_noise[row]
        return self.last_sample.add(self.last_noise, alpha=share) if share else self.last_sample

    def _advance(self) -> None:
        assert self._step_index is not None
        order, left = self._corrector, len(self._times) - self._step_index
        # A step that is left to diffusers corrects the last one by its order.
        self.this_corrector_order = min(order, self.lower_order_nums + 2, left + 1 if self._lowers else order)
        super()._advance()

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
        noise = draw(due.model_output, generator)
        x = self._move(due, noise=noise, dtype=sample.dtype)
        self.last_noise = noise
        self.timestep_list[:] = [*self.timestep_list[1:], timestep]
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)
