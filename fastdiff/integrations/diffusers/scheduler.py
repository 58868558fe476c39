"""What every drop-in scheduler is made of: timesteps known to the host, a table of rows, and the one operator."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff import ops
from fastdiff.engine.carried import Carried
from fastdiff.integrations import in_pytorch
from fastdiff.integrations.diffusers.tables import DataSlot, data_slot
from fastdiff.ops.dispatch import plain_step
from fastdiff.samplers.table import StepTable

__all__ = ["IndexedScheduler", "Run", "Scheduler", "draw", "refuse_index"]

_WHOLE = (torch.int32, torch.int64)


@dataclass
class Run(Carried):
    """A table on its way: row 0 belongs to index `start` of the scheduler's timesteps.

    levels    the tensor of sigmas that the table was made from; another one asks for another table
    data      where the rows give the data prediction for the caller, which is then no history and no anchor
    rows      of the table, on the CPU
    """

    start: int = field(kw_only=True)
    levels: Tensor | None = field(kw_only=True)
    data: DataSlot = field(kw_only=True)
    rows: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rows = self.table.tensor()


class Scheduler:
    """First base of every drop-in class; its second is diffusers' own class, which keeps all but the steps.

    `timesteps` stays an ordinary tensor to its users. What it holds is also kept as numbers, read when it is set, so
    that no step has to wait for a device to hear which timestep it is at.
    """

    config: Any
    num_inference_steps: Any
    alphas_cumprod: Tensor
    _timesteps: Tensor
    _times: list[float]
    _starts: dict[float, int] | None = None
    _run: Run | None = None

    @classmethod
    def _get_compatibles(cls) -> list[type]:
        """diffusers' classes of the same family, and ours in place of those that we have."""
        from fastdiff.integrations import diffusers as drop_in

        theirs = super()._get_compatibles()  # type: ignore[misc]
        return [getattr(drop_in, kind.__name__, kind) for kind in theirs]

    @property
    def timesteps(self) -> Tensor:
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        self._timesteps = value
        self._times = [] if value is None or value.is_meta else value.tolist()
        self._starts = None
        self._run = None

    def _position(self, timestep: Any) -> int | None:
        """Where in `timesteps` a tensor lies that was taken out of it; None for anything else. Nothing is read."""
        if not isinstance(timestep, Tensor) or timestep.numel() != 1:
            return None
        times = self._timesteps
        if timestep.untyped_storage()._cdata != times.untyped_storage()._cdata or timestep.dtype != times.dtype:
            return None
        offset = int(timestep.storage_offset()) - int(times.storage_offset())
        place, rest = divmod(offset, max(times.stride(0), 1))
        return place if rest == 0 and 0 <= place < times.numel() else None

    def _positions(self, timesteps: Tensor) -> list[int] | None:
        """The same of each element of a one-dimensional tensor: a slice, or one element that was expanded."""
        count = timesteps.numel()
        first, last = (self._position(end) for end in (timesteps[:1], timesteps[-1:]))
        if first is None or last is None:
            return None
        step, rest = divmod(last - first, max(count - 1, 1))
        return [first + place * step for place in range(count)] if rest == 0 else None

    def _time(self, timestep: Any) -> float:
        """The timestep as a number. A tensor that was not taken out of `timesteps` has to be waited for."""
        position = self._position(timestep)
        if position is not None:
            return self._times[position]
        return timestep.item() if isinstance(timestep, Tensor) else timestep

    def _apply(
        self,
        run: Run,
        row: int,
        sample: Tensor,
        model_output: Tensor,
        *,
        noise: Tensor | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """x' in `dtype` (the sample's unless said) and the data prediction in float32 where the table gives it.

        History and anchor move on in `run`. options: further ones of `ops.sampler_step`, such as a kept part.
        """
        if dtype is not None and sample.dtype is not dtype:
            if dtype is torch.float64:
                sample = sample.double()
            elif sample.dtype is not torch.float32:
                sample = sample.float()
        table = run.table
        _, reads_noise, reads_anchor, depth, makes_anchor, makes_history, keeps_state = table.uses[row]
        anchor, history = run.anchor if reads_anchor else None, run.history[:depth]
        noise = noise if reads_noise else None
        if keeps_state and run.data != "anchor" and sample.dtype is torch.float32 and sample.is_contiguous():
            # diffusers keeps the caller's tensor as well.
            run.anchor, makes_anchor = sample, False
        made = None
        if sample.is_cpu and not options and table.threshold is None:
            # The way of nearly every step, without what the public function takes for all the others: 2 us of 7.
            made = plain_step(sample, model_output, run.rows, row, anchor, history, noise, makes_history, makes_anchor)
        if made is None:
            options |= {"anchor": anchor, "history": history, "noise": noise}
            options |= {"new_history": makes_history, "new_anchor": makes_anchor}
            made = _any_step(table, row, sample, model_output, options)[:3]
        x, new_history, new_anchor = made
        data = None
        if run.data == "history":
            data, new_history = new_history, None
        elif run.data == "anchor":
            data, new_anchor = new_anchor, None
        run.keep(new_history, new_anchor)
        return x if dtype is None or x.dtype is dtype else x.to(dtype), data


class IndexedScheduler(Scheduler):
    """A scheduler that counts its steps: `_step_index` is looked up once and then rises by one a step.

    `sigmas`, which some classes keep on the device, is known as numbers as `timesteps` is.

    A class says how its table is made (`_table`), and up to how many earlier steps its rows depend on (`_memory`).
    """

    _sigmas: Tensor
    _sigma_values: list[float]
    _step_index: int | None
    _begin_index: int | None
    lower_order_nums: int = 0

    @property
    def sigmas(self) -> Tensor:
        return self._sigmas

    @sigmas.setter
    def sigmas(self, value: Tensor) -> None:
        self._sigmas = value
        self._sigma_values = [] if value.is_meta else value.tolist()

    def _table(self, start: int) -> tuple[StepTable, bool]:
        """The table of the steps from index `start` on, and whether the caller is given the data prediction."""
        raise NotImplementedError

    def _memory(self) -> int:
        return 0

    def _taken(self) -> int:
        """How many earlier steps are known, up to `_memory`."""
        return self.lower_order_nums

    def _init_step_index(self, timestep: Any) -> None:
        if self._begin_index is not None:
            self._step_index = self._begin_index
        else:
            self._step_index = self._first_index(self._time(timestep) if self._times else timestep)

    def _first_index(self, time: Any) -> int:
        """Where a run starts that is first called with this timestep: at the second of two equal ones, so that a start
        in the middle skips no level."""
        if not self._times:
            position = self._position(time)
            return 0 if position is None else position
        if self._starts is None:
            found: dict[float, list[int]] = {}
            for index, other in enumerate(self._times):
                found.setdefault(other, []).append(index)
            # What is no number is equal to nothing, itself included.
            self._starts = {other: found[other][:2][-1] for other in found if other == other}
        if time in self._starts:
            return self._starts[time]
        return int(self.index_for_timestep(time))  # type: ignore[attr-defined]

    def _at(self, timestep: Any) -> tuple[Run, int]:
        """The run and its row for the step that is due."""
        index = self._step_index
        if index is None:
            self._init_step_index(timestep)
            index = self._step_index
            assert index is not None
        run = self._run
        if run is None or run.levels is not self._sigmas or not self._follows(run, index):
            run = self._begin(index)
        return run, index - run.start

    def _follows(self, run: Run, index: int) -> bool:
        """Whether the row of `index` assumes as many earlier steps as were taken."""
        taken, memory = self._taken(), self._memory()
        row = index - run.start
        return row >= 0 and min(row, memory) == min(taken, memory)

    def _begin(self, index: int) -> Run:
        past, last = self._run, min(self._taken(), self._memory(), index)
        table, gives_data = self._table(index - last)
        self._run = Run(table, start=index - last, levels=self.sigmas, data=data_slot(table) if gives_data else None)
        if past is not None and last:
            self._run.history, self._run.anchor = past.history, past.anchor
        return self._run

    def _advance(self) -> None:
        """Counts a step that was taken."""
        assert self._step_index is not None
        self._step_index += 1
        if self.lower_order_nums < self._memory():
            self.lower_order_nums += 1


def draw(like: Tensor, generator: Any, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal noise as diffusers draws it, so that the generator moves on alike."""
    dtype = dtype or like.dtype
    if like.device.type == "cpu" and not isinstance(generator, list):
        return ops.torch_normal(like.shape, generator=generator, dtype=dtype)
    return randn_tensor(like.shape, generator=generator, device=like.device, dtype=dtype)


def refuse_index(timestep: Any) -> None:
    """ValueError for an integer, which is an index rather than a timestep."""
    if isinstance(timestep, Tensor):
        whole = timestep.dtype in _WHOLE and timestep.is_cpu
    else:
        whole = isinstance(timestep, int)
    if whole:
        raise ValueError(
            f"timestep: expected one of the scheduler's timesteps, got the integer {timestep!r}; "
            "pass the elements of scheduler.timesteps, not their indices"
        )


def _any_step(
    table: StepTable, row: int, sample: Tensor, model_output: Tensor, options: dict[str, Any]
) -> ops.StepOutput:
    recorded = (sample.requires_grad or model_output.requires_grad) and torch.is_grad_enabled()
    if recorded or sample.dtype is torch.float64 or model_output.dtype is torch.float64:
        return in_pytorch.sampler_step(table, row, sample, model_output, **options)
    rows = table.tensor(sample.device)
    if table.threshold is not None and table.uses[row].data:
        percentile, maximum = table.threshold.percentile, table.threshold.maximum
        options["scales"] = ops.dynamic_threshold(
            sample, model_output, rows, row, percentile=percentile, maximum=maximum
        )
    return ops.sampler_step(sample, model_output, rows, row, **options)
