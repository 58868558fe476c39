"""A sampler's step in the middle of a run: diffusers' `scheduler.step` against the same row of a table.

The scheduler is put into the state it has at that step before every call, so that each call is the same step. Without
diffusers the baseline is the row in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.work import Work
from fastdiff import ops, samplers, schedules
from fastdiff.ops import reference
from fastdiff.ops.row import INPUTS, NEW_X, PREDICTION
from fastdiff.samplers import StepTable
from fastdiff.samplers.adams import Interval, corrector_weights
from fastdiff.samplers.problem import Problem

STEPS, INDEX = 20, 10
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@dataclass(frozen=True)
class State:
    """What a step reads: the sample, the network's output, and what earlier steps left."""

    x: Tensor
    m: Tensor
    last: Tensor
    history: tuple[Tensor, Tensor]


Step = Callable[[State], Tensor]
Array = np.ndarray[Any, np.dtype[np.float64]]


def build(case: Case, device: torch.device) -> Work:
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)
    x, m, last, h1, h2 = (torch.randn(case.shape, generator=generator).to(device) for _ in range(5))
    # Sample, network output and last sample come in the case's dtype. The data predictions are float32 with us and in
    # the case's dtype with them; values that both can hold make the comparison exact.
    state = State(x.to(dtype), m.to(dtype), last.to(dtype), (h1.to(dtype), h2.to(dtype)))
    table, step = _CASES[case.variant]()
    row, use = table.rows[INDEX], table.uses[INDEX]
    history = tuple(tensor.float() for tensor in state.history[: use.history])
    anchor = _anchor(table, state) if use.anchor else None
    rows = torch.tensor(row, dtype=torch.float32).unsqueeze(0).to(device)

    def ours() -> Tensor:
        return ops.sampler_step(
            state.x,
            state.m,
            rows,
            0,
            anchor=anchor,
            history=history,
            new_history=use.new_history,
            new_anchor=use.new_anchor,
        ).x

    def specified(x: Tensor, m: Tensor) -> Tensor:
        older = (*history, None, None, None)[:3]
        return reference.sampler_step(x, m, rows, 0, None, anchor, *older, *(None,) * 7, False, False, None, None)[0]

    read = [state.x, state.m, *history, *([] if anchor is None else [anchor])]
    written = [state.x, *([x.float()] * (use.new_history + use.new_anchor))]
    return Work(
        peers={
            **({} if step is None else {"diffusers": partial(step, state)}),
            "pytorch": partial(_plain, row, state, history, anchor),
        },
        ours=ours,
        truth=specified(state.x.double(), state.m.double()),
        plain=specified(state.x, state.m),
        traffic=sum(tensor.numel() * tensor.element_size() for tensor in (*read, *written)),
    )


def _anchor(table: StepTable, state: State) -> Tensor:
    """UniPC's correction of the state as far as the last step knew it, from that step's start and data predictions."""
    points = Problem(schedules.scaled_linear(1000), table.grid, table.prediction, None).points()
    before = points[INDEX - 1], points[INDEX - 2]
    interval = Interval(before[0], points[INDEX], data=True)
    _, first, second = corrector_weights(interval, before, None)
    newest, older = (tensor.float() for tensor in state.history)
    return interval.carry * state.last.float() + first * newest + second * older


def _plain(row: Array, state: State, history: tuple[Tensor, ...], anchor: Tensor | None) -> Tensor:
    """The row as an expression in float32, an operation at a time."""
    values = {"x": state.x.float(), "m": state.m.float(), **{f"hist{i}": old for i, old in enumerate(history, 1)}}
    if anchor is not None:
        values["anchor"] = anchor
    of_x, of_m = row[PREDICTION].tolist()
    values["D"] = of_x * values["x"] + of_m * values["m"]
    terms = zip(INPUTS, row[NEW_X].tolist(), strict=True)
    new = None
    for name, coefficient in terms:
        if coefficient != 0.0:
            term = coefficient * values[name]
            new = term if new is None else new + term
    assert new is not None
    return new.to(state.x.dtype)


def _scheduler(name: str, **options: Any) -> Any:
    """A scheduler of diffusers before its first step; None where the library is not installed."""
    if find_spec("diffusers") is None:
        return None
    import diffusers

    scheduler = getattr(diffusers, name)(**BETAS, **options)
    scheduler.set_timesteps(STEPS)
    return scheduler


def _table(method: str, **options: Any) -> StepTable:
    options = {**samplers.find(method).diffusers, **options}
    return samplers.build(method, schedule=schedules.scaled_linear(1000), steps=STEPS, **options)


def _ddim() -> tuple[StepTable, Step | None]:
    scheduler = _scheduler("DDIMScheduler", clip_sample=False)

    def step(state: State) -> Tensor:
        return scheduler.step(state.m, scheduler.timesteps[INDEX], state.x, return_dict=False)[0]

    return _table("ddim", clip=None), None if scheduler is None else step


def _dpmpp_2m() -> tuple[StepTable, Step | None]:
    scheduler = _scheduler("DPMSolverMultistepScheduler")

    def step(state: State) -> Tensor:
        scheduler._step_index = INDEX
        scheduler.lower_order_nums = 2
        scheduler.model_outputs = [state.history[1], state.history[0]]
        return scheduler.step(state.m, scheduler.timesteps[INDEX], state.x, return_dict=False)[0]

    return _table("dpmpp_2m"), None if scheduler is None else step


def _unipc() -> tuple[StepTable, Step | None]:
    scheduler = _scheduler("UniPCMultistepScheduler")

    def step(state: State) -> Tensor:
        times = scheduler.timesteps
        scheduler._step_index = INDEX
        scheduler.lower_order_nums = scheduler.this_order = 2
        scheduler.model_outputs = [state.history[1], state.history[0]]
        scheduler.timestep_list = [times[INDEX - 2], times[INDEX - 1]]
        scheduler.last_sample = state.last
        return scheduler.step(state.m, times[INDEX], state.x, return_dict=False)[0]

    return _table("unipc"), None if scheduler is None else step


_CASES: dict[str, Callable[[], tuple[StepTable, Step | None]]] = {"ddim": _ddim, "dpmpp_2m": _dpmpp_2m, "unipc": _unipc}
