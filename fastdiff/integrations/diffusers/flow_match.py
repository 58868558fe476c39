"""Flow matching: Euler and Heun."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteSchedulerOutput
from torch import Tensor

from fastdiff import config
from fastdiff.integrations.diffusers.noising import ScaleNoise, at_indices
from fastdiff.integrations.diffusers.scheduler import IndexedScheduler, draw, refuse_index
from fastdiff.integrations.diffusers.tables import flow_schedule, levels, on_both_inputs, table
from fastdiff.ops import native
from fastdiff.samplers.table import StepTable

_SINGLE = torch.float32
_MOST_CHURN = math.sqrt(2.0) - 1.0
_Churn = tuple[float, float, float, float]
_LONG_STEP = 100.0
"""So many times the level that it ends at, a step of Heun shows in 1e-6 of x how diffusers rounds."""


class FlowMatchEulerDiscreteScheduler(ScaleNoise, IndexedScheduler, diffusers.FlowMatchEulerDiscreteScheduler):
    """Rows of `flow_euler`; time that runs the other way (`invert_sigmas`) makes their levels rise.

    _is_bare   whether a row is nothing but x + dt m
    """

    _is_bare = False

    def _table(self, start: int) -> tuple[StepTable, bool]:
        config = self.config
        options = {"stochastic": config.stochastic_sampling}
        self._is_bare = not config.stochastic_sampling
        return _flow_table("flow_euler", config, self._sigma_values[start:], self._times[start:], start, options), False

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Any = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMatchEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """The state at the next level, in the dtype of `model_output`; s_churn to s_noise change nothing."""
        # The way of nearly every step. diffusers' is a product and a sum, beside which every check would show.
        if not return_dict and per_token_timesteps is None and not config.detours:
            run, index, bare_step = self._run, self._step_index, native.bare_step()
            if bare_step and run is not None and index is not None and run.levels is self._sigmas and self._is_bare:
                made: tuple[Tensor] | None = bare_step(sample, model_output, run.rows, index - run.start, timestep)
                if made is not None:
                    self._step_index = index + 1
                    return made
        refuse_index(timestep)
        if self._step_index is None:
            self._init_step_index(timestep)
        if per_token_timesteps is not None or sample.shape != model_output.shape or not self._has_rows():
            options = {"per_token_timesteps": per_token_timesteps, "generator": generator, "return_dict": return_dict}
            return super().step(model_output, timestep, sample, **options)  # type: ignore[misc]
        run, row = self._at(timestep)
        noise = draw(sample, generator, torch.float32) if self.config.stochastic_sampling else None
        x, _ = self._apply(run, row, sample, model_output, noise=noise, dtype=model_output.dtype)
        self._advance()
        return _result(FlowMatchEulerDiscreteSchedulerOutput, x, return_dict)

    def _has_rows(self) -> bool:
        """Whether the levels are those of a run: with one step and `shift_terminal`, diffusers divides by zero."""
        run = self._run
        return (run is not None and run.levels is self.sigmas) or all(map(math.isfinite, self._sigma_values))


class _FirstCall(NamedTuple):
    """What the first call of a step of Heun was given, at the level sigma that churn raised."""

    x: Tensor
    model_output: Tensor
    sigma: float
    raised_sigma: float
    noise: Tensor | None
    s_noise: float

    @property
    def raised(self) -> Tensor:
        """The state with its churn, in float32."""
        x = self.x.float()
        if self.noise is None:
            return x
        return x + self.noise * self.s_noise * math.sqrt(self.raised_sigma**2 - self.sigma**2)


class FlowMatchHeunDiscreteScheduler(IndexedScheduler, diffusers.FlowMatchHeunDiscreteScheduler):
    """Rows of `flow_heun`, with its churn. Each level but the ends stands twice in `sigmas`, for the two calls of a
    step; `dt` is None before the first of them."""

    dt: Any
    _churn: _Churn = (0.0, 0.0, math.inf, 1.0)
    _first: _FirstCall | None = None

    @property
    def prev_derivative(self) -> Any:
        """u at the step's first call, while the second is due; no step of ours reads it."""
        if self._first is None:
            return vars(self).get("prev_derivative")
        return _rounded(self._first.model_output, self._first.raised, self._first.sigma, self._first.raised_sigma)

    @prev_derivative.setter
    def prev_derivative(self, value: Any) -> None:
        vars(self)["prev_derivative"], self._first = value, None

    @property
    def sample(self) -> Any:
        """The state that the step began with, after its churn, while the second call is due."""
        return vars(self).get("sample") if self._first is None else self._first.raised

    @sample.setter
    def sample(self, value: Any) -> None:
        vars(self)["sample"] = value

    def _table(self, start: int) -> tuple[StepTable, bool]:
        points = [self._sigma_values[start], *self._sigma_values[start + 1 :: 2]]
        s_churn, s_tmin, s_tmax, s_noise = self._churn
        # They are compared with float32 levels.
        ends = {"s_tmin": float(np.float32(s_tmin)), "s_tmax": float(np.float32(s_tmax))}
        options = {"s_churn": s_churn, "s_noise": s_noise, **ends}
        made = _flow_table("flow_heun", self.config, points, points, start // 2, options)
        return made if s_churn > 0.0 else on_both_inputs(made, "m"), False

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
        generator: Any = None,
        return_dict: bool = True,
    ) -> FlowMatchHeunDiscreteSchedulerOutput | tuple[Tensor]:
        """The state at the next level, first by Euler and, called again, by Heun; in the dtype of `model_output`.

        s_churn, s_tmin, s_tmax, s_noise    those of `samplers.flow.flow_heun`
        """
        refuse_index(timestep)
        if self._step_index is None:
            self._init_step_index(timestep)
        index = self._step_index
        assert index is not None
        first = self.dt is None
        fits = sample.shape == model_output.shape
        over = index >= len(self._times)
        if (
            over
            or vars(self).get("prev_derivative") is not None
            or (first and not (fits and self._has_rows(index, s_churn)))
        ):
            churn = {"s_churn": s_churn, "s_tmin": s_tmin, "s_tmax": s_tmax, "s_noise": s_noise}
            theirs = super().step  # type: ignore[misc]
            return theirs(model_output, timestep, sample, **churn, generator=generator, return_dict=return_dict)
        sigma = self._sigma_values[index if first else index - 1]
        noise = None
        if s_churn > 0.0 and np.float32(s_tmin) <= sigma <= np.float32(s_tmax):
            noise = draw(model_output, generator)
        m = model_output if fits else model_output.expand(sample.shape).contiguous()
        if first:
            self._set_churn((s_churn, s_tmin, s_tmax, s_noise))
            raised = sigma
            if noise is not None:
                raised *= 1.0 + min(s_churn / (len(self._sigma_values) - 1), _MOST_CHURN)
            self.dt = self._sigma_values[index + 1] - raised
            self._first = _FirstCall(sample, model_output, sigma, raised, noise, s_noise)
        else:
            if self._is_long(index - 1):
                end = self._sigma_values[index]
                m = _rounded(m, sample.float(), end, end)
            self.dt = self._first = None
        run, row = self._at(timestep)
        x, _ = self._apply(run, row, sample, m, noise=noise, dtype=model_output.dtype)
        if first and s_churn <= 0.0:
            run.history = (m.to(torch.promote_types(m.dtype, torch.float32)).contiguous(),)
        self._advance()
        return _result(FlowMatchHeunDiscreteSchedulerOutput, x, return_dict)

    def _has_rows(self, index: int, s_churn: float) -> bool:
        """Whether there are rows for the step of two calls that begins here. A run that was told to begin between two
        calls stays at their level, and the rounding of a long step depends on its noise."""
        return index % 2 == 0 and not (s_churn > 0.0 and self._is_long(index))

    def _is_long(self, index: int) -> bool:
        start, end = self._sigma_values[index : index + 2]
        return end > 0.0 and abs(end - start) > _LONG_STEP * end

    def _set_churn(self, churn: _Churn) -> None:
        """A step with another churn than the one before begins a table of its own."""
        if churn != self._churn:
            self._churn = churn
            self._run = None

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """(1 - sigma) x + sigma z at the step that is due, or at `timestep` before the first."""
        if self._step_index is None:
            self._init_step_index(timestep)
        assert self._step_index is not None
        noised = at_indices(self, "flow", sample, noise, [self._step_index])
        if noised is None:
            noised = super().scale_noise(sample, timestep, noise)  # type: ignore[misc]
        return noised


def _result(kind: Any, x: Tensor, return_dict: bool) -> Any:
    return kind(prev_sample=x) if return_dict else (x,)


def _rounded(m: Tensor, x: Tensor, sigma: float, divisor: float) -> Tensor:
    """u as diffusers has it, from x and the data prediction: the less is left of it, the smaller sigma is."""
    return (x - (x - sigma * m)) / divisor


def _flow_table(
    method: str, config: Any, points: list[float], times: list[float], skipped: int, options: dict[str, Any]
) -> StepTable:
    alphas, sigmas = levels(points, flow=True)
    return table(
        method,
        schedule=flow_schedule(config.num_train_timesteps),
        prediction="flow",
        timesteps=times,
        alphas=alphas,
        sigmas=sigmas,
        skipped=skipped,
        options=options,
    )
