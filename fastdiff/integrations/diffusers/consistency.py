"""Distilled models: latent consistency and trajectory consistency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_lcm import LCMSchedulerOutput
from diffusers.schedulers.scheduling_tcd import TCDSchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.alphas_cumprod import Velocity, joint_dtype
from fastdiff.integrations.diffusers.by_timestep import ByTimestep
from fastdiff.integrations.diffusers.intervals import Made, Step
from fastdiff.integrations.diffusers.scheduler import IndexedScheduler, Run, draw


class _Distilled(Velocity, ByTimestep, IndexedScheduler):
    """Where a step leads depends on its index; where it starts, on the timestep that it is called with."""

    def _keys(self) -> Sequence[Any]:
        return [(time, index) for index, time in enumerate(self._times)] if self.num_inference_steps else ()

    def _due(self, timestep: Any, options: Any = None) -> tuple[Run, int] | None:
        """The run and row of the step that is due."""
        if self.num_inference_steps is None:
            return None
        if self._step_index is None:
            self._init_step_index(timestep)
        return self._row((self._moment(timestep), self._step_index), options)

    def _distilled(
        self, found: tuple[Run, int], sample: Tensor, model_output: Tensor, generator: Any, noisy: bool
    ) -> tuple[Tensor, Tensor]:
        """x' and the state that the network gave, from which noise led to x'."""
        dtype = joint_dtype(sample, model_output)
        # Theirs draws none in the last step alone.
        noisy = noisy and self._step_index != self.num_inference_steps - 1
        noise = draw(model_output, generator, dtype) if noisy else None
        result = self._take(found, sample, model_output, noise=noise)
        self._advance()
        return result

    def _root(self, square: Tensor) -> Tensor:
        return square.sqrt()

    def _data_dtype(self, sample: Tensor, model_output: Tensor) -> torch.dtype:
        return joint_dtype(sample, model_output)


class LCMScheduler(_Distilled, diffusers.LCMScheduler):
    """Rows of `lcm`."""

    _method = "lcm"
    sigma_data = 0.5

    def _step(self, key: tuple[int, int], options: Any) -> Step:
        time, index = key
        if index == self.num_inference_steps - 1:
            return Step(time, self._level(time), 1.0)
        following = int(self._times[index + 1]) if index + 1 < len(self._times) else time
        return Step(time, self._level(time), self._level_or_clean(following))

    def _rows(self, steps: list[Step], options: Any) -> Made | None:
        clean = [step._replace(end=1.0) for step in steps]
        return self._made_with(clean, steps, timestep_scaling=self.config.timestep_scaling)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> LCMSchedulerOutput | tuple[Tensor, ...]:
        """The state at the next timestep, and the data that the network gave."""
        found = self._due(timestep) if model_output.shape == sample.shape else None
        if found is None:
            return super().step(model_output, timestep, sample, generator, return_dict)  # type: ignore[misc]
        x, denoised = self._distilled(found, sample, model_output, generator, True)
        return LCMSchedulerOutput(prev_sample=x, denoised=denoised) if return_dict else (x, denoised)


class TCDScheduler(_Distilled, diffusers.TCDScheduler):
    """Rows of `tcd`, whose eta is the step's own."""

    _method = "tcd"

    def _step(self, key: tuple[int, int], options: float) -> Step:
        time, index = key
        following = int(self._times[index + 1]) if index + 1 < len(self._times) else 0
        # In single precision, as theirs, which decides where a product falls on a whole number.
        beyond = self._level(int(np.floor(np.float32(1.0 - options) * np.float32(following))))
        if index == self.num_inference_steps - 1 or options == 0.0:
            return Step(time, self._level(time), beyond, beyond=beyond)
        return Step(time, self._level(time), self._level_or_clean(following), beyond=beyond)

    def _rows(self, steps: list[Step], options: float) -> Made | None:
        passed = [step._replace(end=step.beyond or 0.0) for step in steps]
        return self._made_with(passed, steps, eta=options)

    def _network(self) -> dict[str, Any] | None:
        network = super()._network()
        # Theirs bounds nothing, whatever its configuration says.
        return network and {**network, "clip": None, "threshold": None}

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.3,
        generator: Any = None,
        return_dict: bool = True,
    ) -> TCDSchedulerOutput | tuple[Tensor, ...]:
        """The state at the next timestep, and the one beyond it from which noise led there."""
        found = self._due(timestep, eta) if model_output.shape == sample.shape else None
        if found is None:
            return super().step(model_output, timestep, sample, eta, generator, return_dict)  # type: ignore[misc]
        x, noised = self._distilled(found, sample, model_output, generator, eta > 0)
        return TCDSchedulerOutput(prev_sample=x, pred_noised_sample=noised) if return_dict else (x, noised)
