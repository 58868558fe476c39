"""Measured rows tried beside diffusers' own steps, so that those which rounding parts from them are known beforehand.

Of the terms that cancel only some can be seen in a row's coefficients: others cancel inside a step of diffusers, or
only with what the network gives, and what a step keeps carries its rounding into later ones. So a run of both is made
on a few small states when the rows are, and no tensor of a real run is looked at.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.integrations.diffusers.scheduler import Run
from fastdiff.schedules import Array

_MOST_APART = 2e-6
"""Of a state's norm. The roundings of most rows differ by 2e-7, and what is promised is 1e-5."""
_NETWORKS = 4
_SHAPE = (3, 8)
"""Channels, of which a network with variances has no fewer, and elements of each."""


def rows_left(scheduler: Any, theirs: Any, steps: Any, times: Sequence[float], sizes: Array) -> int:
    """How many rows, from the first on, are left to diffusers: those up to the last with another result than its own,
    since what it keeps of the earlier ones is part of that result.

    scheduler   ours; steps: the rows that it would take
    theirs      diffusers' own class on the same levels, at the first row's index
    times       the timesteps that the steps are called with
    sizes       of the states that they start from
    """
    ours, start = copy.copy(scheduler), theirs._step_index
    for each in (ours, theirs):
        for name, value in vars(each).items():
            if isinstance(value, list):
                # A step of diffusers changes its lists where they are.
                setattr(each, name, list(value))
        each.model_outputs = [None] * len(scheduler.model_outputs)
        each.lower_order_nums, each._step_index = 0, start
        each.last_sample = each.sample = None
    ours._steps, ours._run = steps, Run(steps.table, start=start, levels=ours.sigmas, data=None)
    ours._look()
    with torch.no_grad():
        results = _results(ours, theirs, times, sizes)
    a, b = (torch.stack(each).double() for each in zip(*results, strict=True))
    errors = ((a - b).norm(dim=(2, 3)) / b.norm(dim=(2, 3)).clamp(min=torch.finfo(torch.float32).tiny)).numpy()
    apart = np.flatnonzero((errors > _MOST_APART).any(axis=1))
    return int(apart[-1]) + 1 if apart.size else 0


def _results(ours: Any, theirs: Any, times: Sequence[float], sizes: Array) -> list[tuple[Tensor, Tensor]]:
    """Of every step, both from the same states: those that diffusers comes to, and others that have the step's size."""
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    takes = "generator" in type(theirs).step.__code__.co_varnames
    draws = [{"generator": generator} if takes else {} for generator in generators[:2]]
    noise = torch.randn(2, 2, _NETWORKS, *_SHAPE, generator=generators[2], dtype=torch.float32, device="cpu")
    new, other = noise[0], noise[1, 0]
    x, made = new * float(sizes[0]), []
    for row, time in enumerate(times):
        x[1] = new[1].roll(row, -1) * float(sizes[row])
        m = _outputs(x, time, other.roll(row, -1)).flatten(0, 1)
        state = x.flatten(0, 1)
        made.append(
            tuple(
                each.step(m, time, state, return_dict=False, **draw)[0]
                for each, draw in zip((theirs, ours), draws, strict=True)
            )
        )
        x = made[-1][0].clone().view_as(x)
    return made


def _outputs(x: Tensor, time: float, other: Tensor) -> Tensor:
    """Of four networks, each for its own states: three that are more or less like the state, and one that is not."""
    bent = torch.tanh(x)
    near = 0.9 * x[:, 0] + 0.3 * bent[:, 0]
    size = torch.linalg.vector_norm(x[:, 0], dim=(-2, -1), keepdim=True) / math.sqrt(math.prod(_SHAPE))
    # Of a standard deviation of at most 1, as a network's is.
    near = near / size.clamp(min=1.0)
    share = time / (time + 1.0) if time > 0.0 else 0.5
    return torch.stack([near, share * x[:, 1], 0.3 * bent[:, 2], other[0].expand_as(near)], dim=1)
