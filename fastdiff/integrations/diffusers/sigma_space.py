"""What the schedulers of the k-diffusion family share: their state is y = x / alpha = x_0 + sigma epsilon."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff import schedules
from fastdiff.integrations.diffusers.scheduler import IndexedScheduler, Run
from fastdiff.integrations.diffusers.tables import PREDICTIONS, levels, table
from fastdiff.samplers.table import StepTable

SPACE = schedules.linear()
"""Any schedule that keeps the variance: the levels are the scheduler's own, and nothing else is asked of it."""
MOST_SHRINK = 16.0
"""So many times smaller, a state is what is left when terms cancel: it shows in 1e-6 how float32 rounds them."""
_HALF = (torch.float16, torch.bfloat16)


class SigmaScheduler(IndexedScheduler):
    """Row i of its table belongs to index i of its timesteps, wherever a run starts.

    unfinished   predictions that diffusers knows by name and refuses
    _theirs      indices whose step is left to diffusers, as `_left` says
    _rowless     those of them that have no row
    """

    unfinished: tuple[str, ...] = ()
    _theirs: frozenset[int] = frozenset()
    _rowless: frozenset[int] = frozenset()
    is_scale_input_called: bool
    _step_index: Any

    def _at(self, timestep: Any) -> tuple[Run, int]:
        run, index = self._run, self._step_index
        if run is not None and index is not None and run.levels is self._sigmas:
            return run, index
        return super()._at(timestep)

    def _begin(self, index: int) -> Run:
        sigmas = self._sigma_values
        self._theirs = frozenset(self._left(sigmas))
        count = len(self._times)
        self._rowless = frozenset(i for i in self._theirs if i >= count or not self._has_row(i))
        return super()._begin(0)

    def _has_row(self, index: int) -> bool:
        return 0.0 < self._sigma_values[index] < math.inf

    def _leaves(self, row: int, model_output: Tensor) -> bool:
        """Whether the step is diffusers' own. One that keeps no digits in float32 has a row for outputs in half
        precision: diffusers rounds the products with them to half, and so is further from the truth."""
        return row in self._theirs and (row in self._rowless or model_output.dtype not in _HALF)

    def _leave(self, *arguments: Any) -> Any:
        """diffusers' own step, with levels as numbers of the same dtype: those it can compare without reading them."""
        sigmas = self._sigmas
        self._sigmas = np.array(self._sigma_values, dtype=str(sigmas.dtype).removeprefix("torch."))  # type: ignore[assignment]
        try:
            return super().step(*arguments)  # type: ignore[misc]
        finally:
            self._sigmas = sigmas

    def _left(self, sigmas: Sequence[float]) -> Iterator[int]:
        """Indices of the steps whose result is what diffusers' rounding leaves, or no number; and those after the last
        timestep, which there are where a run starts at the second of two equal timesteps."""
        for index, (start, end) in enumerate(pairwise(sigmas)):
            if index >= len(self._times) or not self._keeps_digits(start, end):
                yield index

    def _keeps_digits(self, start: float, end: float) -> bool:
        """Whether `keeps_digits`, and of the v-prediction keeps them of x as well: x' has (1 + r r')/(1 + r^2) of it,
        which diffusers makes as x less nearly all of it."""
        v = self.config.prediction_type == "v_prediction"
        return keeps_digits(start, end) and not (v and 1.0 + start**2 >= MOST_SHRINK * (1.0 + start * end))

    def _prediction(self) -> str:
        name = self.config.prediction_type
        if name in self.unfinished:
            raise NotImplementedError(f"prediction_type: {name!r} is not implemented for this scheduler")
        if name not in PREDICTIONS or name == "flow_prediction":
            raise ValueError(f"prediction_type: expected 'epsilon', 'v_prediction' or 'sample', got {name!r}")
        return PREDICTIONS[name]

    def _rows(
        self,
        method: str,
        *,
        sigmas: Tensor | Sequence[float],
        times: Sequence[float],
        options: Mapping[str, Any] | None = None,
        clip: float | None = None,
    ) -> tuple[StepTable, bool]:
        """The table on these levels, as far as there are times, and whether it gives D."""
        prediction, used = self._prediction(), len(times) + 1
        # An unbounded data prediction of the network's own is its output, which costs nothing to give back.
        gives_data = prediction != "sample" or clip is not None
        alphas, noise = levels(sigmas)
        made = table(
            method,
            schedule=SPACE,
            prediction=prediction,
            timesteps=times,
            alphas=alphas[:used],
            sigmas=noise[:used],
            clip=clip,
            # The unused ones count in churn, which is shared out over all levels.
            skipped=len(alphas) - used,
            gives_data=gives_data,
            options=options,
        )
        return made, gives_data


def keeps_digits(start: float, end: float) -> bool:
    """Whether a step between these levels makes a state that is not much smaller than the terms it is the sum of."""
    return start > 0.0 and math.hypot(1.0, start) < MOST_SHRINK * math.hypot(1.0, end)


NO_CHURN = (0.0, 0.0, math.inf, 1.0)
_EDGE = 1e-9
"""Far less than two float32 levels differ by, far more than two float64 ways to the same level."""


class ChurnScheduler(SigmaScheduler):
    """A `SigmaScheduler` whose `step` is given churn: there is a table for each choice of s_churn, s_tmin, s_tmax and
    s_noise."""

    _churn: tuple[float, float, float, float] = NO_CHURN
    _raised: Sequence[bool] = ()
    """For each index whether noise is drawn there."""

    def _takes(self, churn: tuple[float, float, float, float]) -> bool:
        """Whether rows can have this churn; the next step has it then."""
        if churn[0] == 0.0:
            churn = NO_CHURN
        if churn == self._churn:
            return True
        s_churn, s_tmin, s_tmax, s_noise = churn
        if churn is not NO_CHURN and not (s_churn > 0.0 and s_tmin >= 0.0 and s_tmax >= 0.0 and 0.0 <= s_noise <= 10.0):
            return False
        self._churn, self._run = churn, None
        return True

    def _begin(self, index: int) -> Run:
        s_churn, low, high = self._churn[0], *self._bounds()
        self._raised = [s_churn > 0.0 and low <= sigma <= high for sigma in self.sigmas.tolist()]
        return super()._begin(index)

    def _bounds(self) -> tuple[float, float]:
        """The levels between which there is churn, so that a bound equal to a float32 level includes it."""
        low, high = (float(np.float32(bound)) for bound in self._churn[1:3])
        return low * (1.0 - _EDGE), high * (1.0 + _EDGE)

    def _churn_options(self) -> dict[str, Any]:
        if self._churn is NO_CHURN:
            return {}
        low, high = self._bounds()
        s_churn, s_noise = float(self._churn[0]), float(self._churn[3])
        return {"churn_call": "before", "s_churn": s_churn, "s_tmin": low, "s_tmax": high, "s_noise": s_noise}


def result_dtype(sample: Tensor, model_output: Tensor) -> torch.dtype:
    """The dtype of diffusers' result where it converts nothing."""
    dtype = sample.dtype
    return dtype if dtype is model_output.dtype else torch.promote_types(dtype, model_output.dtype)


def history_of(kept: Sequence[Tensor], count: int, like: Tensor) -> tuple[Tensor, ...]:
    """The last `count` of what was kept, newest first, as the operator takes it; zeros for those that are missing, as
    in a run that starts in the middle."""
    newest = [value.float().contiguous() for value in kept[: -count - 1 : -1]] if count else []
    missing = count - len(newest)
    if missing:
        newest += [torch.zeros(like.shape, device=like.device)] * missing
    return tuple(newest)
