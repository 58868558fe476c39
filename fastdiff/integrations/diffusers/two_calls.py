"""What the schedulers with two network calls a step share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations.diffusers.noising import AddNoise
from fastdiff.integrations.diffusers.scheduler import Run
from fastdiff.integrations.diffusers.sigma_space import SigmaScheduler

_MOST_RATIO = 64.0
"""Of two levels: the slope at the second has the rounding of the state divided by that level."""


class TwoCallScheduler(AddNoise, SigmaScheduler):
    """Index 2 k is the first call of step k, index 2 k + 1 its second; the last step, to sigma = 0, has one.

    Which of the two is due stands in public fields of diffusers' (`state_in_first_order`). Where that is not what the
    index says, as after a start at an odd index, a class leaves the step to diffusers' own.
    """

    state_in_first_order: bool
    _second: int | None = None
    """The index of the second call whose first one left its anchor in the run."""

    @property
    def _ends(self) -> Tensor:
        """The levels of the steps' ends: each step's first level, and the last's end."""
        steps = (len(self._times) + 1) // 2
        return torch.cat([self.sigmas[:1], self.sigmas[1 : 2 * steps : 2]])

    def _left(self, sigmas: Sequence[float]) -> Iterator[int]:
        ends, lost = self._ends.tolist(), False
        for first, (start, end) in zip(range(0, len(sigmas), 2), pairwise(ends), strict=False):
            far = start > _MOST_RATIO * end > 0.0
            # Rounding that a far step has made large leaves a state that the data are nothing beside.
            hidden = lost and end == 0.0
            if start == end or not self._keeps_digits(start, end) or far or hidden:
                yield from (first, first + 1)
            lost |= far
        yield from range(len(self._times), len(sigmas))

    def _has_row(self, index: int) -> bool:
        """The rows of a step between equal levels are there only to be counted."""
        ends = self._ends[index // 2 : index // 2 + 2].tolist()
        return ends[0] != ends[1] and super()._has_row(index)

    def _due(self, timestep: Any, sample: Tensor, model_output: Tensor) -> tuple[Run, int] | None:
        """The run and its row for this call; None where no row is made for it."""
        if sample.shape != model_output.shape:
            return None
        run, row = self._at(timestep)
        if row in self._theirs and self._leaves(row, model_output):
            return None
        if self.state_in_first_order:
            self._second = row + 1
            return None if row % 2 else (run, row)
        return (run, row) if row == self._second and row % 2 and run.anchor is not None else None
