"""DDIM and its inverse."""

from __future__ import annotations

from typing import Any

import diffusers
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.schedulers.scheduling_ddim_inverse import DDIMSchedulerOutput as InverseOutput
from torch import Tensor

from fastdiff.integrations.diffusers.alphas_cumprod import Velocity
from fastdiff.integrations.diffusers.by_timestep import ByTimestep
from fastdiff.integrations.diffusers.intervals import Made, Step
from fastdiff.integrations.diffusers.scheduler import draw


class DDIMScheduler(Velocity, ByTimestep, diffusers.DDIMScheduler):
    """Rows of `ddim`, each step of the length T // steps."""

    _method = "ddim"

    def _step(self, key: int, options: Any) -> Step:
        before = key - self.config.num_train_timesteps // self.num_inference_steps
        return Step(key, self._level(key), self._level_or_clean(before), self._added(key, before))

    def _rows(self, steps: list[Step], options: tuple[float, bool]) -> Made | None:
        eta, clipped = options
        return self._made(steps, eta=eta, clipped_epsilon=clipped)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> DDIMSchedulerOutput | tuple[Tensor, ...]:
        """The state at the previous timestep, and the data prediction."""
        found = None
        if model_output.shape == sample.shape and (variance_noise is None or _usable(variance_noise, sample)):
            found = self._row(self._moment(timestep), (eta, use_clipped_model_output))
        if found is None:
            options = (eta, use_clipped_model_output, generator, variance_noise, return_dict)
            return super().step(model_output, timestep, sample, *options)  # type: ignore[misc]
        noise = None
        if eta > 0:
            if variance_noise is not None and generator is not None:
                raise ValueError("step: expected generator or variance_noise, got both; pass one of them")
            noise = draw(model_output, generator) if variance_noise is None else variance_noise
        others = () if noise is None else (noise,)
        x, data = self._take(found, sample, model_output, *others, noise=noise)
        return DDIMSchedulerOutput(prev_sample=x, pred_original_sample=data) if return_dict else (x, data)


class DDIMInverseScheduler(ByTimestep, diffusers.DDIMInverseScheduler):
    """Rows of `ddim_inverse`, each step of the length T // steps."""

    _method = "ddim_inverse"
    _clean = "initial_alpha_cumprod"

    def _step(self, key: int, options: Any) -> Step:
        trained = self.config.num_train_timesteps
        start = min(key - trained // self.num_inference_steps, trained - 1)
        return Step(start, self._level_or_clean(start), self._level(key))

    def _rows(self, steps: list[Step], options: Any) -> Made | None:
        return self._made(steps, clipped_epsilon=False)

    def step(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> InverseOutput | tuple[Tensor, ...]:
        """The state at the timestep, which lies further in the noise than the sample, and the data prediction."""
        found = self._row(self._moment(timestep)) if model_output.shape == sample.shape else None
        if found is None:
            return super().step(model_output, timestep, sample, return_dict)  # type: ignore[misc]
        x, data = self._take(found, sample, model_output)
        return InverseOutput(prev_sample=x, pred_original_sample=data) if return_dict else (x, data)


def _usable(noise: Tensor, sample: Tensor) -> bool:
    """Whether the operator takes it; what has to be broadcast or differentiated is left to diffusers."""
    return noise.shape == sample.shape and noise.is_floating_point() and not noise.requires_grad
