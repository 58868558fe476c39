"""What the exponential multistep classes share: their steps are measured, and their state is diffusers' own."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastdiff.config import use_backend
from fastdiff.integrations.diffusers.measured import HISTORY, Solver, measured_table
from fastdiff.integrations.diffusers.scheduler import IndexedScheduler
from fastdiff.ops.row import INPUTS, NEW_X, PREDICTION
from fastdiff.samplers.table import StepTable

__all__ = ["MultistepScheduler", "promoted"]

_MOST_GROWTH = 8.0
"""Of the state in one step, beyond which most of it is taken away again by the noise prediction."""


class MultistepScheduler(IndexedScheduler):
    """A scheduler whose rows are measured (`measured_table`), and whose history is its `model_outputs`.

    What a row cannot hold is left to diffusers' own step: more than three earlier outputs, tensors that broadcast, and
    configurations whose step raises an error. A class says in `_solver` what it is measured by.
    """

    _solver: ClassVar[Solver]
    model_outputs: list[Any]
    _measured = False
    _draws = False
    _first_three = False
    _cancelling: frozenset[int] = frozenset()

    def _memory(self) -> int:
        return len(self.model_outputs)

    def _settings(self) -> tuple[tuple[str, Hashable], ...]:
        """Attributes that the steps depend on, as `measured_table` takes them."""
        return ()

    def _table(self, start: int) -> tuple[StepTable, bool]:
        table = measured_table(self, self._solver, start, self._settings())
        grown = np.abs(table.rows[:, NEW_X][:, [INPUTS.index("x"), INPUTS.index("anchor")]]).max(axis=1)
        self._cancelling = frozenset(np.flatnonzero(grown > _MOST_GROWTH).tolist())
        return table, False

    def _first_index(self, time: Any) -> int:
        if self._times and time not in self._times:
            return len(self._times) - 1
        return super()._first_index(time)

    def _look(self) -> None:
        """What the steps of a run need of the configuration, each look at which costs as much as a part of a step."""
        config = self.config
        self._draws = config.get("algorithm_type", "").startswith("sde")
        self._first_three = config.get("variance_type") is not None and config.prediction_type == "epsilon"
        self._measured = len(self.model_outputs) <= len(HISTORY)

    def _ready(self, model_output: Tensor, sample: Tensor) -> Tensor | None:
        """The network's output as the row reads it; None where the step is left to diffusers."""
        if self.num_inference_steps is None:
            raise ValueError("step: expected a scheduler with timesteps, got none; call set_timesteps first")
        if self._run is None:
            self._look()
        if not self._measured:
            return None
        if self._first_three:
            model_output = model_output[:, :3].contiguous()
        return model_output if model_output.shape == sample.shape else None

    def _move(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *,
        noise: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """x' in `dtype`, or in that of the converted output where it is None; the state moves on as diffusers' does."""
        run, row = self._at(timestep)
        use = run.table.uses[row]
        dtype = dtype or _converted(sample, model_output, run.table, row)
        if sample.dtype is torch.float64 or model_output.dtype is torch.float64:
            sample, model_output = sample.double(), model_output.double()
        outputs = self.model_outputs
        wide = torch.float64 if sample.dtype is torch.float64 else torch.float32
        run.history = tuple(_plain(outputs[-1 - j], wide) for j in range(use.history))
        run.anchor = _plain(self._anchor(), wide) if use.anchor else None
        if noise is not None and noise.shape != sample.shape:
            noise = noise.expand(sample.shape)
        if row in self._cancelling:
            # Two large terms leave a small one, and so their rounding: the reference rounds each as diffusers does.
            with use_backend("reference"):
                x, _ = self._apply(run, row, sample, model_output, noise=noise, dtype=dtype)
        else:
            x, _ = self._apply(run, row, sample, model_output, noise=noise, dtype=dtype)
        if use.new_history:
            del outputs[0]
            outputs.append(run.history[0])
        if use.new_anchor:
            self._keep(run.anchor)
        self._advance()
        return x

    def _anchor(self) -> Any:
        """The earlier state that a step starts from."""
        return None if self._solver.anchor is None else getattr(self, self._solver.anchor)

    def _keep(self, anchor: Tensor | None) -> None:
        if self._solver.anchor is not None:
            setattr(self, self._solver.anchor, anchor)


def promoted(sample: Tensor, model_output: Tensor) -> torch.dtype:
    """The dtype of their sum."""
    if sample.dtype is model_output.dtype:
        return sample.dtype
    return torch.promote_types(sample.dtype, model_output.dtype)


def _converted(sample: Tensor, model_output: Tensor, table: StepTable, row: int) -> torch.dtype:
    """The dtype of what diffusers converts the network's output to: that of the output, where the state has no part."""
    if sample.dtype is model_output.dtype or table.rows[row, PREDICTION][0] == 0.0:
        return model_output.dtype
    return promoted(sample, model_output)


def _plain(value: Tensor, dtype: torch.dtype) -> Tensor:
    """As the operator reads it: what a caller put there may be neither float32 nor contiguous."""
    return value if value.dtype is dtype and value.is_contiguous() else value.to(dtype).contiguous()
