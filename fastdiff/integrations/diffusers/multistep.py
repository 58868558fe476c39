"""What the exponential multistep classes share: their steps are measured, and their state is diffusers' own."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from fastdiff.integrations.diffusers.measured import HISTORY, Measured, Solver, measured
from fastdiff.integrations.diffusers.scheduler import IndexedScheduler, Run
from fastdiff.ops.row import PREDICTION
from fastdiff.samplers.table import StepTable

__all__ = ["MultistepScheduler"]


class MultistepScheduler(IndexedScheduler):
    """A scheduler whose rows are measured (`measured`), and whose history is its `model_outputs`.

    What a row cannot hold is left to diffusers' own step: more than three earlier outputs, tensors that broadcast,
    steps whose large terms cancel, so that only the same sequence of roundings gives the same result, and
    configurations whose step raises an error. A class says in `_solver` what it is measured by.
    """

    _solver: ClassVar[Solver]
    model_outputs: list[Any]
    _measured = False
    _draws = False
    _first_three = False
    _steps: Measured

    def _memory(self) -> int:
        return len(self.model_outputs)

    def _counted(self) -> int:
        """How many outputs are kept though no row may read them, since the steps are counted by them."""
        return 0

    def _settings(self) -> tuple[tuple[str, Hashable], ...]:
        """Attributes that the steps depend on, as `measured` takes them."""
        return ()

    def _called(self) -> Sequence[float]:
        """The timestep that the step of each index is called with."""
        return self._times

    def _table(self, start: int) -> tuple[StepTable, bool]:
        self._steps = measured(self, self._solver, start, self._settings())
        return self._steps.table, False

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

    def _due(self, model_output: Tensor, timestep: Any, sample: Tensor) -> _Due | None:
        """What the step that is due consists of; None where it is left to diffusers."""
        if self.num_inference_steps is None:
            raise ValueError("step: expected a scheduler with timesteps, got none; call set_timesteps first")
        if self._run is None:
            self._look()
        if not self._measured:
            return None
        if self._first_three:
            model_output = model_output[:, :3].contiguous()
        if model_output.shape != sample.shape:
            return None
        if self._step_index is not None and self._step_index >= len(self._times):
            # There diffusers ends in an error whatever the outputs are, but another one where they are missing.
            self.model_outputs = [model_output] * len(self.model_outputs)
            return None
        run, row = self._at(timestep)
        if row >= len(run.table) and self._steps.fault is not None:
            raise self._steps.fault
        if row in self._steps.theirs or (run.table.uses[row].anchor and self._anchor() is None):
            return None
        return _Due(run, row, model_output, sample)

    def _left(self, model_output: Tensor, timestep: Any, sample: Tensor, *options: Any) -> Any:
        """The step that diffusers itself takes, from what it would have kept: in its dtype, where ours is float32.

        options   the other arguments of its `step`, in their order
        """
        dtype, anchor = torch.promote_types(sample.dtype, model_output.dtype), self._anchor()
        self.model_outputs = [None if output is None else output.to(dtype) for output in self.model_outputs]
        if anchor is not None:
            self._keep(anchor.to(sample.dtype))
        return self._solver.theirs.step(self, model_output, timestep, sample, *options)

    def _move(self, due: _Due, *, noise: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """x' in `dtype`, or in that of the converted output where it is None; the state moves on as diffusers' does."""
        run, row, model_output, sample = due
        use = run.table.uses[row]
        dtype = dtype or _converted(due)
        wide = torch.float32
        if sample.dtype is torch.float64 or model_output.dtype is torch.float64:
            sample, model_output, wide = sample.double(), model_output.double(), torch.float64
        outputs = self.model_outputs
        run.history = ()
        if use.history:
            run.history = tuple([_plain(output, wide) for output in outputs[: -1 - use.history : -1]])
        run.anchor = _plain(self._read_anchor(row), wide) if use.anchor else None
        if noise is not None and noise.shape != sample.shape:
            noise = noise.expand(sample.shape)
        x, _ = self._apply(run, row, sample, model_output, noise=noise, dtype=dtype)
        if use.new_history:
            del outputs[0]
            outputs.append(run.history[0])
            kept = max(run.table.depth, self._counted())
            if self._steps.theirs:
                # What a step of theirs may read: a corrector all of them, a predictor all but the one that it forgets.
                kept = len(outputs) - (self._solver.corrector is None)
            unread = len(outputs) - kept
            outputs[:unread] = [None] * unread
        if use.new_anchor:
            self._keep(run.anchor)
        self._advance()
        return x

    def _anchor(self) -> Any:
        """The earlier state that a step starts from."""
        return None if self._solver.anchor is None else getattr(self, self._solver.anchor)

    def _read_anchor(self, row: int) -> Tensor:
        """The same as a row reads it."""
        return self._anchor()

    def _keep(self, anchor: Tensor | None) -> None:
        if self._solver.anchor is not None:
            setattr(self, self._solver.anchor, anchor)


class _Due(NamedTuple):
    """A row of a run and what it is applied to."""

    run: Run
    row: int
    model_output: Tensor
    sample: Tensor

    @property
    def promoted(self) -> torch.dtype:
        """The dtype of a sum of the two."""
        first, second = self.sample.dtype, self.model_output.dtype
        return first if first is second else torch.promote_types(first, second)


def _converted(due: _Due) -> torch.dtype:
    """The dtype of what diffusers converts the network's output to: that of the output, where the state has no part."""
    _, row, model_output, sample = due
    if model_output.dtype is sample.dtype or due.run.table.rows[row, PREDICTION][0] == 0.0:
        return model_output.dtype
    return due.promoted


def _plain(value: Tensor, dtype: torch.dtype) -> Tensor:
    """As the operator reads it: what a caller put there may be neither float32 nor contiguous."""
    return value if value.dtype is dtype and value.is_contiguous() else value.to(dtype).contiguous()
