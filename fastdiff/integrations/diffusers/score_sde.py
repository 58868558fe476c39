"""The score SDE whose variance explodes: predictor and Langevin corrector."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_sde_ve import SdeVeOutput
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastdiff import ops, schedules
from fastdiff.integrations.diffusers.scheduler import Run, Scheduler, draw
from fastdiff.integrations.diffusers.sigma_space import MOST_SHRINK
from fastdiff.integrations.diffusers.tables import table
from fastdiff.ops.row import INPUTS, NEW_ANCHOR, NEW_X
from fastdiff.samplers.table import StepTable
from fastdiff.schedules import Array, Schedule


class ScoreSdeVeScheduler(Scheduler, diffusers.ScoreSdeVeScheduler):
    """Rows of `reverse_sde` by reverse diffusion, and that of its corrector; the few steps of a run so short that the
    state becomes many times smaller in one are done term by term, since their rounding shows.

    _separate   rows of those
    """

    _discrete_sigmas: Tensor
    _levels: tuple[float, ...]
    _separate: frozenset[int] = frozenset()

    @property
    def discrete_sigmas(self) -> Tensor:
        return self._discrete_sigmas

    @discrete_sigmas.setter
    def discrete_sigmas(self, value: Tensor) -> None:
        self._discrete_sigmas = value
        self._levels = tuple(value.tolist())
        self._run = None

    def step_pred(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> SdeVeOutput | tuple[Tensor, Tensor]:
        """The state at the next level, and that state without its noise."""
        self._check_timesteps()
        if isinstance(timestep, Tensor) and timestep.numel() != 1:
            options = {"generator": generator, "return_dict": return_dict}
            return super().step_pred(model_output, timestep, sample, **options)  # type: ignore[misc]
        run, row = self._row(timestep)
        noise = draw(sample, generator)
        dtype = _dtype(sample, model_output)
        if row in self._separate:
            x, mean = _term_by_term(run.table, row, sample.to(dtype), model_output.to(dtype), noise.to(dtype))
        else:
            x, data = self._apply(run, row, sample, model_output, noise=noise, dtype=dtype)
            assert data is not None
            mean = data.to(x.dtype)
        return SdeVeOutput(prev_sample=x, prev_sample_mean=mean) if return_dict else (x, mean)

    def step_correct(
        self, model_output: Tensor, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> SchedulerOutput | tuple[Tensor]:
        """x + e s + sqrt(2 e) z, s the score and e = 2 (snr |z| / |s|)^2 with the norms' means over the batch."""
        self._check_timesteps()
        # Drawn on the CPU and moved, as diffusers does it.
        noise = _on_the_host(sample.shape, generator)
        x = ops.langevin_correct(sample, model_output, noise, snr=self.config.snr)
        if x is None:
            noise = noise.to(sample.device, non_blocking=True)
            scales = _langevin_scales(model_output, noise, self.config.snr)
            run, dtype = Run(_corrector(), start=0, levels=None, data=None), _dtype(sample, model_output)
            x, _ = self._apply(run, 0, sample, model_output, noise=noise, scales=scales, dtype=dtype)
        return SchedulerOutput(prev_sample=x) if return_dict else (x,)

    def _check_timesteps(self) -> None:
        if self.timesteps is None:
            raise ValueError("step: expected a scheduler with timesteps, got none; call set_timesteps first")

    def _row(self, timestep: float | Tensor) -> tuple[Run, int]:
        """The rows of all levels from the last to the first, and that of this time in [0, 1]."""
        run = self._run
        if run is None:
            run = self._run = Run(_predictor(self._levels), start=0, levels=None, data="anchor")
            self._separate = frozenset(_losing_digits(self._levels[::-1]))
        # float32, as the index is found there: the product may fall on either side of a whole number.
        level = int(np.float32(self._time(timestep)) * np.float32(len(self._times) - 1))
        row = len(run.table) - 1 - level
        if row < 0:
            raise IndexError(f"step_pred: the timestep is at level {level}, and there are {len(run.table)} levels")
        return run, row


@lru_cache(maxsize=16)
def _predictor(sigmas: tuple[float, ...]) -> StepTable:
    """Rows that also write x' without its noise, as the anchor.

    They are x + G^2 score + G z as diffusers rounds G: it shows where neighbours among thousands of levels differ by
    little, and where what is left of x is small.
    """
    levels = np.array(sigmas[::-1])
    # At 0 the last step would have no noise, which diffusers adds.
    made = _reverse_sde(np.append(levels, sys.float_info.min), predictor="reverse_diffusion")
    # PyTorch's root, which is not always NumPy's.
    squares = torch.tensor([*sigmas[::-1], 0.0], dtype=torch.float32) ** 2
    roots = (squares[:-1] - squares[1:]) ** 0.5
    added, factors = roots.numpy(), (roots**2).numpy()
    rows = made.rows.copy()
    for name, weight in (("x", 1.0), ("m", factors), ("D", 0.0), ("noise", added)):
        rows[:, NEW_X.start + INPUTS.index(name)] = weight
    rows[:, NEW_ANCHOR] = rows[:, NEW_X]
    rows[:, NEW_ANCHOR.start + INPUTS.index("noise")] = 0.0
    rows.flags.writeable = False
    return made.with_rows(rows)


def _term_by_term(made: StepTable, row: int, x: Tensor, score: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """x' and x' without its noise, rounded after every term as diffusers does."""
    weights = made.rows[row, NEW_X]
    mean = x + score * float(weights[INPUTS.index("m")])
    return mean + noise * float(weights[INPUTS.index("noise")]), mean


def _losing_digits(levels: Sequence[float]) -> Iterator[int]:
    """Rows whose state without noise is much smaller than the one before, which has the noise of the level before it:
    (sigma' / sigma)^2 of that is left, and data of size 1."""
    for row, (before, start, end) in enumerate(zip((0.0, *levels), levels, (*levels[1:], 0.0), strict=False)):
        if math.hypot(1.0, before, start) >= MOST_SHRINK * math.hypot(1.0, end**2 / max(start, sys.float_info.min)):
            yield row


@lru_cache(maxsize=1)
def _corrector() -> StepTable:
    """One row, which is that of every level."""
    return _reverse_sde(np.ones(2), predictor="none", corrector_steps=1)


def _reverse_sde(sigmas: Array, **options: Any) -> StepTable:
    return table(
        "reverse_sde",
        schedule=_schedule(),
        prediction="score",
        timesteps=sigmas.tolist(),
        alphas=np.ones_like(sigmas),
        sigmas=sigmas,
        options=options,
    )


@lru_cache(maxsize=1)
def _schedule() -> Schedule:
    """Any of the kind: the levels are the scheduler's own."""
    return schedules.ve()


def _on_the_host(shape: torch.Size, generator: Any) -> Tensor:
    if isinstance(generator, list):
        return randn_tensor(shape, generator=generator)
    return ops.torch_normal(shape, generator=generator, dtype=torch.get_default_dtype())


def _langevin_scales(score: Tensor, noise: Tensor, snr: float) -> Tensor:
    """(inf, e, sqrt(2 e)) for each sample: the same for all, from the norms' means over the batch."""
    norms = [
        torch.linalg.vector_norm(
            value.reshape(len(value), -1), dim=1, dtype=torch.promote_types(value.dtype, torch.float32)
        )
        for value in (noise, score)
    ]
    size = (2.0 * (snr * norms[0].mean() / norms[1].mean()) ** 2).float()
    scales = torch.stack((torch.full_like(size, math.inf), size, (2.0 * size).sqrt()))
    return scales.expand(len(score), 3).contiguous()


def _dtype(sample: Tensor, model_output: Tensor) -> torch.dtype:
    """That of diffusers' results, whose coefficients are float32 tensors."""
    return torch.promote_types(torch.promote_types(sample.dtype, model_output.dtype), torch.float32)
