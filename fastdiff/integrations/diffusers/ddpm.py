"""DDPM, and the form of it that unCLIP samples with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import diffusers
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.schedulers.scheduling_unclip import UnCLIPSchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.alphas_cumprod import Noising, Velocity, numbers
from fastdiff.integrations.diffusers.by_timestep import ByTimestep
from fastdiff.integrations.diffusers.intervals import Made, Step
from fastdiff.integrations.diffusers.scheduler import draw
from fastdiff.ops.row import VARIANCE

_VARIANCES = {
    "fixed_small": "fixed_small",
    "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large",
    "learned": "learned",
    "learned_range": "learned_range",
}
_LEARNED = ("learned", "learned_range")


class _Ancestral(ByTimestep):
    """Rows of `ddpm`, with diffusers' noise in the last step."""

    _method = "ddpm"
    _clean = "one"
    variance_type: Any
    betas: Tensor

    def _rows(self, steps: list[Step], options: str) -> Made | None:
        # The root of a logarithm, which fixed_large_log takes, is no number.
        if options not in _VARIANCES or options != self.config.variance_type:
            return None
        return self._made(steps, variance=_VARIANCES[options], final_noise=True)

    def _ancestral(
        self, key: Any, time: Any, sample: Tensor, model_output: Tensor, generator: Any
    ) -> tuple[Tensor, Tensor] | None:
        variance = self.variance_type
        shape, channels = sample.shape, 2 if variance in _LEARNED else 1
        if model_output.shape != (shape if channels == 1 else (shape[0], channels * shape[1], *shape[2:])):
            return None
        found = self._row(key, variance)
        if found is None:
            return None
        noise = draw(sample, generator, model_output.dtype) if time > 0 else None
        if noise is not None and variance == "learned":
            # Theirs is the variance itself, not its logarithm.
            noise = noise.float() * model_output[:, shape[1] :].float().sqrt()
        return self._take(found, sample, model_output, noise=noise)


class DDPMScheduler(Velocity, _Ancestral, diffusers.DDPMScheduler):
    """Rows of `ddpm` with the variance that the configuration names."""

    custom_timesteps: bool

    def _keys(self) -> Sequence[Any]:
        return self._times if self.custom_timesteps or self.num_inference_steps else ()

    def _step(self, key: int, options: str) -> Step:
        before = self._before(key)
        return Step(key, self._level(key), self._level_or_clean(before), self._added(key, before))

    def _before(self, time: int) -> int:
        times = self._keys()
        if not times:
            return time - 1
        try:
            following = times.index(time) + 1
        except ValueError:
            raise IndexError(f"timestep {time} is none of the run") from None
        return -1 if following == len(times) else times[following]

    def _rows(self, steps: list[Step], options: str) -> Made | None:
        made = super()._rows(steps, options)
        if made is None or options != "learned":
            return made
        rows = made.table.rows.copy()
        rows[:, VARIANCE] = 0.0
        rows.flags.writeable = False
        return made._replace(table=made.table.with_rows(rows))

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, ...]:
        """The state at the previous timestep, and the data prediction."""
        time = self._moment(timestep)
        result = self._ancestral(time, time, sample, model_output, generator)
        if result is None:
            return super().step(model_output, timestep, sample, generator, return_dict)  # type: ignore[misc]
        x, data = result
        return DDPMSchedulerOutput(prev_sample=x, pred_original_sample=data) if return_dict else result


class UnCLIPScheduler(Noising, _Ancestral, diffusers.UnCLIPScheduler):
    """Rows of `ddpm` between the timesteps that each step is called with."""

    _predictions = ("epsilon", "sample")

    def _keys(self) -> Sequence[Any]:
        if not self.num_inference_steps:
            return ()
        times = self._times
        return [*pairwise(times), *((time, time - 1) for time in times)]

    def _step(self, key: tuple[int, int], options: str) -> Step:
        time, before = key
        added = float(numbers(self.betas)[time]) if before == time - 1 else self._added(time, before)
        if options == "learned_range" and (before < 0 < time or added <= 0.0):
            raise ValueError("theirs takes the logarithm of a variance that is not positive here")
        # Theirs takes 1 - beta for alpha^2/alpha'^2, of which little is left where beta is near 1.
        shrink = math.sqrt(1.0 - added)
        return Step(time, self._level(time), self._level_or_clean(before), added, shrink)

    def _rows(self, steps: list[Step], options: str) -> Made | None:
        return super()._rows(steps, options) if options in ("fixed_small_log", "learned_range") else None

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        prev_timestep: int | Tensor | None = None,
        generator: Any = None,
        return_dict: bool = True,
    ) -> UnCLIPSchedulerOutput | tuple[Tensor, ...]:
        """The state at `prev_timestep`, or else one training timestep before, and the data prediction."""
        time = self._moment(timestep)
        result = None
        if time is not None:
            before = time - 1 if prev_timestep is None else self._moment(prev_timestep)
            result = self._ancestral((time, before), time, sample, model_output, generator)
        if result is None:
            options = (prev_timestep, generator, return_dict)
            return super().step(model_output, timestep, sample, *options)  # type: ignore[misc]
        x, data = result
        return UnCLIPSchedulerOutput(prev_sample=x, pred_original_sample=data) if return_dict else result
