"""A run of a ComfyUI sampler: its levels, its noise and its loop."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from fastdiff.integrations.k_diffusion.comfyui.model import (
    NoiseSampler,
    below_pure_noise,
    is_flow,
    noise_scale,
    noise_source,
    sampling_of,
)
from fastdiff.integrations.k_diffusion.loop import Draw, Given, Plan, check_state, read_levels, run


@dataclass(frozen=True, eq=False)
class Run:
    """A model, the state that it starts from, and the levels to which it goes.

    sampling   the model's `model_sampling`, or None
    flow       whether it is one of a flow
    """

    model: Any
    x: Tensor
    sigmas: Tensor
    levels: tuple[float, ...]
    extra_args: dict[str, Any] | None
    sampling: Any
    flow: bool

    @property
    def steps(self) -> int:
        return len(self.levels) - 1

    def scaled(self, s_noise: float) -> float:
        """s_noise times what the model has all fresh noise multiplied by."""
        return s_noise * noise_scale(self.sampling)

    def noise(self, noise_sampler: NoiseSampler | None) -> NoiseSampler:
        """The caller's noise, or that of the seed."""
        return noise_source(self.x, self.extra_args) if noise_sampler is None else noise_sampler

    def at_the_end(self, plan: Plan, noise: NoiseSampler) -> Draw:
        """Noise from s to s' in the last row of each step but one to 0."""

        def draw(step: int, call: int, dtype: torch.dtype) -> Tensor | None:
            if call + 1 < plan.counts[step] or self.levels[step + 1] == 0.0:
                return None
            return noise(self.sigmas[step], self.sigmas[step + 1])

        return draw

    def between_calls(self, plan: Plan, noise: NoiseSampler) -> Draw:
        """Noise in every row of each step but one to 0, from the row's own level to the next row's."""
        starts = [sum(plan.counts[:step]) for step in range(self.steps)]
        inner = torch.tensor(plan.table.levels[:, 1], dtype=self.sigmas.dtype, device=self.sigmas.device)

        def level(step: int, call: int) -> Tensor:
            if call == 0:
                return self.sigmas[step]
            return self.sigmas[step + 1] if call == plan.counts[step] else inner[starts[step] + call]

        def draw(step: int, call: int, dtype: torch.dtype) -> Tensor | None:
            if self.levels[step + 1] == 0.0:
                return None
            return noise(level(step, call), level(step, call + 1))

        return draw

    def sample(
        self,
        plan: Plan,
        callback: Any,
        disable: bool | None,
        *,
        draw: Draw | None = None,
        given: Given | None = None,
        extra_args: dict[str, Any] | None = None,
    ) -> Tensor:
        """The state after the plan; extra_args in place of the run's own."""
        return run(
            self.model,
            self.x,
            self.sigmas,
            plan,
            trange(self.steps, disable=disable),
            extra_args=self.extra_args if extra_args is None else extra_args,
            callback=callback,
            draw=draw,
            given=given,
        )


def run_of(model: Any, x: Tensor, sigmas: Tensor, extra_args: dict[str, Any] | None, *, finite: bool = False) -> Run:
    """finite   whether log(alpha/sigma) has to be, for which a flow's first level is moved below 1"""
    check_state(x)
    sampling = sampling_of(model)
    if finite:
        sigmas = below_pure_noise(sigmas, sampling)
    return Run(model, x, sigmas, read_levels(sigmas), extra_args, sampling, is_flow(sampling))
