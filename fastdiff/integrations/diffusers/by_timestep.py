"""Schedulers whose step looks its timestep up: rows by timestep."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.integrations.diffusers.alphas_cumprod import AlphasCumprod, joint_dtype, numbers
from fastdiff.integrations.diffusers.intervals import Made, Step, giving_another_end, one_step_table
from fastdiff.integrations.diffusers.scheduler import Run, Scheduler
from fastdiff.integrations.diffusers.tables import PREDICTIONS, data_slot, threshold_of

_KEPT_LOOKUPS = 1024
_ALONE = object()


@dataclass(frozen=True)
class _Lookup:
    """A table on its way, and which row belongs to which step."""

    run: Run | None
    rows: dict[Hashable, int]


class ByTimestep(AlphasCumprod, Scheduler):
    """A scheduler whose rows depend on the timestep that it is called with, and not on the calls before.

    A class says what steps a run has (`_keys`), where each goes (`_step`) and what table is made of them (`_rows`). Its
    own `step` asks for a row by `_row`, and leaves to diffusers what has none: calls that are errors, and steps whose
    coefficients are not finite.
    """

    _method = ""
    _clean = "final_alpha_cumprod"
    _predictions: tuple[str, ...] = ("epsilon", "sample", "v_prediction")
    _lookups: dict[Hashable, _Lookup]
    _settings: tuple[Any, ...] = (None,) * 5

    def _keys(self) -> Sequence[Hashable]:
        """The steps of a whole run; none where no run was set."""
        return self._times if self.num_inference_steps else ()

    def _step(self, key: Any, options: Any) -> Step:
        """Where a step goes; IndexError, TypeError or ValueError where there is no such step."""
        raise NotImplementedError

    def _rows(self, steps: list[Step], options: Any) -> Made | None:
        """The table of some steps."""
        raise NotImplementedError

    def _network(self) -> dict[str, Any] | None:
        """What a table depends on besides its steps: the prediction and the bounds of the data."""
        config = self.config
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in self._predictions:
            return None
        threshold = threshold_of(config)
        clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample") else None
        return {"prediction": PREDICTIONS[prediction], "clip": 1.0 if threshold else clip, "threshold": threshold}

    def _made(self, steps: list[Step], **options: Any) -> Made | None:
        network, steps = self._network(), self._noised(steps)
        return None if network is None else one_step_table(self._method, steps, **network, options=options)

    def _made_with(self, others: list[Step], steps: list[Step], **options: Any) -> Made | None:
        """The table of `steps` that also gives where the `others`, from the same points, lead."""
        network, others, steps = self._network(), self._noised(others), self._noised(steps)
        if network is None:
            return None
        made = one_step_table(self._method, steps, **network, options=options, gives_data=False)
        if made is None:
            return None
        others = [others[index] for index in made.kept]
        other = one_step_table(self._method, others, **network, options=options, gives_data=False)
        if other is None or len(other.kept) < len(others):
            return None
        return Made(giving_another_end(made.table, other.table), made.kept)

    def _noised(self, steps: list[Step]) -> list[Step]:
        """The steps with sigma as diffusers rounds it: x - sigma m cancels near pure noise, and the last bit shows."""
        dtype = self._alphas2.dtype
        added = (1.0 - torch.from_numpy(np.array(step.start, dtype=dtype)) for step in steps)
        sigmas = [float(numbers(self._root(each))) for each in added]
        return [step._replace(sigma=sigma) for step, sigma in zip(steps, sigmas, strict=True)]

    def _root(self, square: Tensor) -> Tensor:
        """As diffusers takes it: in single precision a power is not always the nearest number to the root."""
        return square**0.5

    def _level(self, timestep: int) -> float:
        """alpha^2 of a timestep, which is counted from the end where it is negative, as by diffusers' tensors."""
        return float(self._alphas2[timestep])

    def _level_or_clean(self, timestep: int) -> float:
        """The same, and the clean end of the schedule before timestep 0."""
        return self._level(timestep) if timestep >= 0 else float(numbers(getattr(self, self._clean)))

    def _added(self, timestep: int, before: int) -> float:
        """1 - alpha^2/alpha'^2 in diffusers' own precision: of a short step it keeps only a few digits."""
        alphas2 = self._alphas2
        end = alphas2[before] if before >= 0 else numbers(getattr(self, self._clean)).astype(alphas2.dtype)
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(alphas2.dtype.type(1.0) - alphas2[timestep] / end)

    def _moment(self, timestep: Any) -> Any:
        """The timestep as a whole number; None where it is none."""
        time = None if isinstance(timestep, Tensor) and timestep.dim() else self._time(timestep)
        return None if isinstance(time, float) else time

    def _row(self, key: Hashable, options: Hashable = None) -> tuple[Run, int] | None:
        """The run and the row of a step; None where diffusers has to take it."""
        config, times, levels, clean, count = self._settings
        if (
            config is not self.__dict__["_internal_dict"]
            or times is not self._times
            or levels is not self._alphas2
            or clean is not getattr(self, self._clean)
            or count != self.num_inference_steps
        ):
            clean, count = getattr(self, self._clean), self.num_inference_steps
            self._settings = (self.__dict__["_internal_dict"], self._times, self._alphas2, clean, count)
            self._lookups = {}
        found = self._lookups.get(options)
        if found is None:
            found = self._look_up(options, self._keys() or (key,), options)
        row = found.rows.get(key)
        if row is None:
            # Not a step of this run, so it has a table of its own.
            alone = (_ALONE, key, options)
            found = self._lookups.get(alone) or self._look_up(alone, (key,), options)
            row = found.rows.get(key)
        return None if row is None or found.run is None else (found.run, row)

    def _look_up(self, name: Hashable, keys: Sequence[Hashable], options: Hashable) -> _Lookup:
        steps: dict[Hashable, Step] = {}
        for key in dict.fromkeys(keys):
            try:
                steps[key] = self._step(key, options)
            except (IndexError, TypeError, ValueError):
                continue
        made = self._rows(list(steps.values()), options) if steps else None
        if len(self._lookups) >= _KEPT_LOOKUPS:
            self._lookups = {}
        if made is None:
            found = _Lookup(None, {})
        else:
            names = list(steps)
            rows = {names[index]: row for row, index in enumerate(made.kept)}
            found = _Lookup(Run(made.table, start=0, levels=None, data=data_slot(made.table)), rows)
        self._lookups[name] = found
        return found

    def _take(
        self, found: tuple[Run, int], sample: Tensor, model_output: Tensor, *others: Tensor, **given: Any
    ) -> tuple[Tensor, Tensor]:
        """x' in the dtype that all the tensors have together, and what the table gives besides it."""
        dtype = joint_dtype(sample, model_output, *others)
        state = sample.double() if dtype == torch.float64 else sample
        x, data = self._apply(*found, state, model_output, dtype=dtype, **given)
        assert data is not None
        dtype = self._data_dtype(sample, model_output)
        return x, data if data.dtype == dtype else data.to(dtype)

    def _data_dtype(self, sample: Tensor, model_output: Tensor) -> torch.dtype:
        """That of diffusers' data prediction."""
        if sample.dtype != model_output.dtype and self.config.get("prediction_type") == "sample":
            return model_output.dtype
        return joint_dtype(sample, model_output)
