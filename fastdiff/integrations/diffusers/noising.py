"""Noise at the scheduler's own levels in one operator: `add_noise` and `scale_noise` of the classes with sigmas."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, TypeGuard

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.integrations.diffusers.tables import levels

Form = Literal["ve", "vp", "flow"]
_FUSED = frozenset((torch.float32, torch.float16, torch.bfloat16))


class AddNoise:
    """`add_noise` by `ops.add_noise`; stands before `IndexedScheduler` among the bases.

    _form   what a level means: "ve" x + sigma z; "vp" (x + sigma z) / sqrt(1 + sigma^2); "flow" (1 - sigma) x +
            sigma z, which "vp" classes also mean with `use_flow_sigmas`
    """

    _form: ClassVar[Form] = "ve"

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The samples at the levels of `timesteps`; `indices` says which those are."""
        noised = at_timesteps(self, self._form, original_samples, noise, timesteps)
        if noised is None:
            noised = super().add_noise(original_samples, noise, timesteps)  # type: ignore[misc]
        return noised


class ScaleNoise:
    """`scale_noise` by `ops.add_noise`, (1 - sigma) x + sigma z; stands before `IndexedScheduler` among the bases."""

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """The sample at the levels of `timestep`, one or one for each; `indices` says which those are."""
        noised = at_timesteps(self, "flow", sample, noise, timestep)
        if noised is None:
            noised = super().scale_noise(sample, timestep, noise)  # type: ignore[misc]
        return noised


def at_timesteps(scheduler: Any, form: Form, x: Tensor, noise: Tensor | None, timesteps: Any) -> Tensor | None:
    """x with noise at the level of each of `timesteps`; None where the operator does not do what diffusers does."""
    if not isinstance(timesteps, Tensor) or timesteps.dim() != 1 or not _fits(x, noise, len(timesteps)):
        return None
    found = indices(scheduler, timesteps)
    return None if found is None else at_indices(scheduler, form, x, noise, found)


def at_indices(scheduler: Any, form: Form, x: Tensor, noise: Tensor | None, found: list[int]) -> Tensor | None:
    """x with noise at the levels of these indices, one for all samples or one for each; None as in `at_timesteps`."""
    if not _fits(x, noise, len(found)):
        return None
    stds = [scheduler._sigma_values[index] for index in found]
    signals = [1.0] * len(stds)
    if form != "ve":
        flow = form == "flow" or bool(scheduler.config.get("use_flow_sigmas"))
        signals, stds = (level.tolist() for level in levels(stds, flow=flow))
    return ops.add_noise(x, _for_each(signals, x), _for_each(stds, x), noise=noise)


def indices(scheduler: Any, timesteps: Tensor) -> list[int] | None:
    """The index of each timestep in the scheduler's sigmas: of the step that is due once a run has started, of its
    start where `set_begin_index` was told it, else where the timestep stands. None where that is not known.

    A tensor that is no view of the scheduler's timesteps has to be waited for where it has to be looked up.
    """
    if scheduler._begin_index is not None:
        due = scheduler._step_index
        return [scheduler._begin_index if due is None else due] * len(timesteps)
    times = scheduler._times
    if not times:
        return None
    positions = scheduler._positions(timesteps)
    values = timesteps.tolist() if positions is None else [times[position] for position in positions]
    return [scheduler._first_index(value) for value in values]


def _fits(x: Tensor, noise: Tensor | None, count: int) -> TypeGuard[Tensor]:
    """Whether the operator takes x, noise and so many levels, and gives what diffusers does."""
    if noise is None or x.shape != noise.shape or x.device != noise.device or not x.numel() or not x.dim():
        return False
    if not _FUSED.issuperset((x.dtype, noise.dtype)) or torch.promote_types(x.dtype, noise.dtype) != x.dtype:
        return False
    if torch.is_grad_enabled() and (x.requires_grad or noise.requires_grad):
        return False
    return count in (1, len(x))


def _for_each(values: list[float], x: Tensor) -> Tensor:
    """One number for each sample of x, on its device, which is not waited for."""
    if values.count(values[0]) == len(values):
        return torch.full((len(x),), values[0], dtype=torch.float32, device=x.device)
    return torch.tensor(values, dtype=torch.float32).to(x.device, non_blocking=True)
