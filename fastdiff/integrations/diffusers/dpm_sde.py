"""The stochastic single-step DPM-Solver++ of k-diffusion."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from diffusers import DPMSolverSDEScheduler as Theirs
from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDESchedulerOutput
from torch import Tensor

from fastdiff.integrations.brownian import BrownianTreeNoiseSampler
from fastdiff.integrations.diffusers.scheduler import Run
from fastdiff.integrations.diffusers.sigma_space import result_dtype
from fastdiff.integrations.diffusers.tables import scaled
from fastdiff.integrations.diffusers.two_calls import TwoCallScheduler
from fastdiff.samplers.table import StepTable

_MOST_NOISE = 10.0
"""What the rows take as s_noise."""
_APART = 1e-9


class DPMSolverSDEScheduler(TwoCallScheduler, Theirs):
    """Rows of `dpmpp_sde` in y = x / alpha, with the noise of diffusers' Brownian tree."""

    unfinished = ("sample",)
    sample: Tensor | None
    mid_point_sigma: Tensor | None
    noise_sampler: Any
    noise_sampler_seed: Any
    _s_noise: float = 1.0
    _spans: list[tuple[Tensor, Tensor]]
    """For each index the two levels that its noise lies between, as diffusers computes them. The second one of a first
    call is where the second call is made."""

    def _table(self, start: int) -> tuple[StepTable, bool]:
        ends = self._ends.tolist()
        found = (float(middle) for _, middle in self._spans[::2])
        # Where rounding leaves no level between the ends, only the formula is left to follow.
        middles = tuple(s if end < s < start else None for (start, end), s in zip(pairwise(ends), found, strict=True))
        options = {"noise": "independent", "s_noise": self._s_noise, "middles": middles}
        for index in reversed(range(len(ends) - 1)):
            # Steps between equal levels are diffusers' own, but have their two rows, so that each index has its own.
            ends[index] = max(ends[index], ends[index + 1] * (1.0 + _APART))
        made, gives_data = self._rows("dpmpp_sde", sigmas=ends, times=self._times[::2], options=options)
        return scaled(made), gives_data

    def _begin(self, index: int) -> Run:
        times, self._spans = [end.log().neg() for end in self._ends], []
        for t, end in pairwise(times):
            middle = t + (end - t) * 0.5
            self._spans += [(t.neg().exp(), to.neg().exp()) for to in (middle, end)]
        return super()._begin(index)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        return_dict: bool = True,
        s_noise: float = 1.0,
    ) -> DPMSolverSDESchedulerOutput | tuple[Tensor, Tensor]:
        """The state at the next timestep, and the data prediction."""
        if s_noise != self._s_noise and 0.0 <= s_noise <= _MOST_NOISE:
            self._s_noise, self._run = float(s_noise), None
        due = self._due(timestep, sample, model_output) if s_noise == self._s_noise else None
        if due is None:
            return Theirs.step(self, model_output, timestep, sample, return_dict, s_noise)
        run, row = due
        if self.noise_sampler is None:
            self._grow_tree(sample)
        last = row + 1 == len(self._times)
        span = self._spans[row]
        noise = None if last else self.noise_sampler(*span)
        dtype = result_dtype(sample, model_output)
        x, data = self._apply(run, row, sample, model_output, noise=noise, dtype=dtype)
        assert data is not None
        data = data.to(dtype)
        between = not (row % 2 or last)
        self.sample, self.mid_point_sigma = (sample, span[1]) if between else (None, None)
        self._step_index += 1
        return DPMSolverSDESchedulerOutput(x, data) if return_dict else (x, data)

    def _grow_tree(self, sample: Tensor) -> None:
        levels = [level for level in self.sigmas.tolist() if level > 0.0]
        self.noise_sampler = BrownianTreeNoiseSampler(sample, min(levels), max(levels), self.noise_sampler_seed)
