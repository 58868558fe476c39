"""Pseudo numerical methods."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from diffusers import PNDMScheduler as Theirs
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from torch import Tensor

from fastdiff.integrations.diffusers.alphas_cumprod import Noising
from fastdiff.integrations.diffusers.scheduler import Run, Scheduler
from fastdiff.integrations.diffusers.sigma_space import MOST_SHRINK, SPACE, history_of, result_dtype
from fastdiff.samplers.grid import Grid
from fastdiff.samplers.pndm import Call, separate_calls
from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import StepTable
from fastdiff.samplers.terms import ADAMS_BASHFORTH

Key = tuple[int, int, tuple[float, ...]]
"""A call: the timesteps that its phi leads from and to, and the weights of the outputs, newest first."""

_SHARES = (1 / 6, 1 / 3, 1 / 3, 1 / 6)
"""Of the four calls of a Runge-Kutta step, in its last one."""


class PNDMScheduler(Noising, Scheduler, Theirs):
    """Rows of phi of `pndm`, one for each call.

    A call is made from what diffusers keeps in public (`counter`, `ets`, `cur_sample`, `cur_model_output`), so that it
    may be set, and `step_prk` and `step_plms` called, in any order. The rows of the calls that follow in a regular run
    are made with the first.
    """

    counter: int
    ets: list[Tensor]
    cur_sample: Tensor | None
    prk_timesteps: Any
    final_alpha_cumprod: Tensor
    _rows: dict[Key, int]
    _levels: tuple[list[float], float] | None = None
    """alpha^2 of the training timesteps and of the end."""
    _partial: list[tuple[float, Tensor]]

    @property
    def cur_model_output(self) -> Any:
        """What is known of a Runge-Kutta step's weighted sum of outputs; added up when it is read."""
        return sum(share * output for share, output in self._partial)

    @cur_model_output.setter
    def cur_model_output(self, value: Any) -> None:
        self._partial = [(1.0, value)] if isinstance(value, Tensor) else []

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """Places the timesteps; the schedule is read here, as `add_noise` may move it to another device."""
        Theirs.set_timesteps(self, num_inference_steps, device)
        self._levels = None
        self._read_levels()

    def _read_levels(self) -> tuple[list[float], float]:
        # Not yet known of a scheduler that was diffusers' own when its timesteps were set.
        if self._levels is None:
            self._levels = self.alphas_cumprod.tolist(), float(self.final_alpha_cumprod)
        return self._levels

    def _keeps_digits(self, start: int, end: int) -> bool:
        """Whether the state of that phi is not what diffusers' rounding leaves of two terms that cancel."""
        products, final = self._read_levels()
        if start >= len(products):
            return True
        return (products[end] if end >= 0 else final) < MOST_SHRINK**2 * products[start]

    def step_prk(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """A call of a Runge-Kutta step: the state at which the next call is made."""
        self._check_timesteps()
        if sample.shape != model_output.shape or (isinstance(timestep, Tensor) and timestep.dim()):
            return Theirs.step_prk(self, model_output, timestep, sample, return_dict)
        phase, outputs = self.counter % 4, [model_output]
        start, end, weights = self._prk_key(self.counter, int(self._time(timestep)))
        if not self._keeps_digits(start, end):
            return Theirs.step_prk(self, model_output, timestep, sample, return_dict)
        if phase == 0:
            self.ets.append(model_output)
            self.cur_sample = sample
        if phase < 3:
            self._partial.append((_SHARES[phase], model_output))
        else:
            known = self._partial if len(self._partial) <= 3 else [(1.0, self.cur_model_output)]
            weights = (_SHARES[3], *(share for share, _ in reversed(known)))
            outputs += [output for _, output in reversed(known)]
            self.cur_model_output = 0
        base = sample if self.cur_sample is None else self.cur_sample
        return self._call((start, end, weights), timestep, base, outputs, return_dict)

    def step_plms(
        self, model_output: Tensor, timestep: int | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state at the next timestep, by as many outputs as are known, up to four."""
        self._check_timesteps()
        if not self.config.skip_prk_steps and len(self.ets) < 3:
            raise ValueError(
                f"step_plms: expected three earlier outputs in ets, got {len(self.ets)}; call step_prk for the first "
                "12 timesteps, or set skip_prk_steps"
            )
        if sample.shape != model_output.shape or (isinstance(timestep, Tensor) and timestep.dim()):
            return Theirs.step_plms(self, model_output, timestep, sample, return_dict)
        known = len(self.ets) if self.counter == 1 else min(len(self.ets), 3) + 1
        key = self._plms_key(self.counter, int(self._time(timestep)), known)
        if not self._keeps_digits(*key[:2]):
            return Theirs.step_plms(self, model_output, timestep, sample, return_dict)
        if self.counter != 1:
            self.ets = [*self.ets[-3:], model_output]
        if len(self.ets) == 1 and self.counter < 2:
            outputs = [model_output, *self.ets] if self.counter else [model_output]
            first, self.cur_sample = self.cur_sample, None if self.counter else sample
            sample = sample if first is None or not self.counter else first
        else:
            outputs = [self.ets[-1 - j] for j in range(len(key[2]))]
        return self._call(key, timestep, sample, outputs, return_dict)

    def _check_timesteps(self) -> None:
        if self.num_inference_steps is None:
            raise ValueError("step: expected a scheduler with timesteps, got none; call set_timesteps first")

    @property
    def _stride(self) -> int:
        return int(self.config.num_train_timesteps // self.num_inference_steps)

    def _prk_key(self, counter: int, time: int) -> Key:
        half = 0 if counter % 2 else self._stride // 2
        start = int(self.prk_timesteps[counter // 4 * 4])
        return start, time - half, _SHARES[::-1] if counter % 4 == 3 else (1.0,)

    def _plms_key(self, counter: int, time: int, known: int) -> Key:
        """`known` counts the newest output."""
        start, end = (time + self._stride, time) if counter == 1 else (time, time - self._stride)
        if known == 1 and counter < 2:
            return start, end, (0.5, 0.5) if counter else (1.0,)
        return start, end, ADAMS_BASHFORTH[known - 1 if known in (2, 3) else 3]

    def _call(
        self, key: Key, timestep: Any, base: Tensor, outputs: Sequence[Tensor], return_dict: bool
    ) -> SchedulerOutput | tuple[Tensor]:
        run = self._run
        if run is None or key not in self._rows:
            run = self._plan(key, timestep)
        run.history = history_of(outputs[:0:-1], len(outputs) - 1, base)
        x, _ = self._apply(run, self._rows[key], base, outputs[0], dtype=result_dtype(base, outputs[0]))
        run.history = ()
        self.counter += 1
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _plan(self, key: Key, timestep: Any) -> Run:
        """The rows of this call and of those that follow it in a regular run."""
        products, final = self._read_levels()
        following = (each for each in self._following(timestep) if each[0] < len(products))
        keys = list(dict.fromkeys([key, *following]))
        ends = [products[end] if end >= 0 else final for _, end, _ in keys]
        calls = ((products[start], end, weights) for (start, _, weights), end in zip(keys, ends, strict=True))
        prediction = self.config.prediction_type
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction_type: expected 'epsilon' or 'v_prediction', got {prediction!r}")
        self._rows = {each: row for row, each in enumerate(keys)}
        table = _table("v" if prediction == "v_prediction" else "epsilon", tuple(calls))
        self._run = Run(table, start=0, levels=None, data=None)
        return self._run

    def _following(self, timestep: Any) -> Iterator[Key]:
        """The calls at the timesteps after this one, as far as the schedule goes."""
        position = self._position(timestep)
        if position is None:
            regular = self.counter < len(self._times) and self._times[self.counter] == int(self._time(timestep))
            position = self.counter if regular else len(self._times)
        known, prk = len(self.ets), 0 if self.config.skip_prk_steps else len(self.prk_timesteps)
        for counter, time in enumerate(self._times[position + 1 :], start=self.counter + 1):
            if counter < prk:
                known += counter % 4 == 0
                key = self._prk_key(counter, int(time))
            else:
                known = known if counter == 1 else min(known, 3) + 1
                key = self._plms_key(counter, int(time), known)
            yield key


@lru_cache(maxsize=64)
def _table(prediction: str, calls: tuple[tuple[float, float, tuple[float, ...]], ...]) -> StepTable:
    """The rows of calls given by alpha^2 at their start, at their end, and their weights."""

    def point(product: float) -> Point:
        return Point(SPACE, prediction, product**0.5, (1.0 - product) ** 0.5, 0.0, 1.0)

    made = [Call(point(start), point(end), weights) for start, end, weights in calls]
    starts = [call.start for call in made] + [made[-1].end]
    alphas, sigmas = (np.array([getattr(each, name) for each in starts]) for name in ("alpha", "sigma"))
    grid = Grid(np.zeros(len(starts)), alphas, sigmas)
    return separate_calls(Problem(SPACE, grid, prediction, None), made)
