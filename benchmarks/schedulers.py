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
from fastdiff.ops.row import CLIP, INPUTS, NEW_ANCHOR, NEW_HISTORY, NEW_X, PREDICTION, ROW_SIZE
from fastdiff.parameterization import Linear

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
    state = State(x.to(dtype), m.to(dtype), last.to(dtype).float(), (h1.to(dtype).float(), h2.to(dtype).float()))
    theirs = State(state.x, state.m, last.to(dtype), (h1.to(dtype), h2.to(dtype)))
    row, step = _CASES[case.variant]()
    table = torch.tensor(row, dtype=torch.float32).unsqueeze(0).to(device)
    uses_history, uses_anchor = case.variant != "ddim", case.variant == "unipc"

    def ours() -> Tensor:
        return ops.sampler_step(
            state.x,
            state.m,
            table,
            0,
            anchor=state.last if uses_anchor else None,
            history=state.history if uses_history else (),
            new_history=uses_history,
            new_anchor=uses_anchor,
        ).x

    def specified(x: Tensor, m: Tensor) -> Tensor:
        older = (*state.history, None) if uses_history else (None, None, None)
        anchor = state.last if uses_anchor else None
        return reference.sampler_step(x, m, table, 0, None, anchor, *older, *(None,) * 7, False, False, None, None)[0]

    read = [state.x, state.m, *(state.history if uses_history else ()), *([state.last] if uses_anchor else ())]
    written = [state.x, *([state.last] if uses_history else ()), *([state.last] if uses_anchor else ())]
    return Work(
        peers={
            **({} if step is None else {"diffusers": partial(step, theirs)}),
            "pytorch": partial(_plain, row, state),
        },
        ours=ours,
        truth=specified(state.x.double(), state.m.double()),
        plain=specified(state.x, state.m),
        traffic=sum(tensor.numel() * tensor.element_size() for tensor in (*read, *written)),
    )


def _plain(row: Array, state: State) -> Tensor:
    """The row as an expression in float32, an operation at a time."""
    values = {"x": state.x.float(), "m": state.m.float(), "anchor": state.last}
    values |= {"hist1": state.history[0], "hist2": state.history[1]}
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


def _table_row(method: str, **options: Any) -> Array:
    options = {**samplers.find(method).diffusers, **options}
    return samplers.build(method, schedule=schedules.scaled_linear(1000), steps=STEPS, **options).rows[INDEX]


def _ddim() -> tuple[Array, Step | None]:
    scheduler = _scheduler("DDIMScheduler", clip_sample=False)

    def step(state: State) -> Tensor:
        return scheduler.step(state.m, scheduler.timesteps[INDEX], state.x, return_dict=False)[0]

    return _table_row("ddim", clip=None), None if scheduler is None else step


def _dpmpp_2m() -> tuple[Array, Step | None]:
    scheduler = _scheduler("DPMSolverMultistepScheduler")

    def step(state: State) -> Tensor:
        scheduler._step_index = INDEX
        scheduler.lower_order_nums = 2
        scheduler.model_outputs = [state.history[1], state.history[0]]
        return scheduler.step(state.m, scheduler.timesteps[INDEX], state.x, return_dict=False)[0]

    return _table_row("dpmpp_2m"), None if scheduler is None else step


def _unipc() -> tuple[Array, Step | None]:
    scheduler = _scheduler("UniPCMultistepScheduler")
    if scheduler is None:
        # Its shape is what counts: the same inputs and outputs, with numbers of the usual size.
        used = {"D": 0.4, "anchor": 0.7, "hist1": -0.2, "hist2": 0.1}
        return _row(Linear(1.1, -0.5), used, used), None
    times = scheduler.timesteps

    def step(state: State) -> Tensor:
        scheduler._step_index = INDEX
        scheduler.lower_order_nums = scheduler.this_order = 2
        scheduler.model_outputs = [state.history[1], state.history[0]]
        scheduler.timestep_list = [times[INDEX - 2], times[INDEX - 1]]
        scheduler.last_sample = state.last
        return scheduler.step(state.m, times[INDEX], state.x, return_dict=False)[0]

    return _probed_row(scheduler, step), step


def _probed_row(scheduler: Any, step: Step) -> Array:
    """The row of a linear step that no table of ours has yet: its response to each input alone."""

    def response(index: int) -> tuple[float, float]:
        x, m, last, h1, h2 = torch.eye(5, dtype=torch.float64)[index].view(5, 1, 1, 1, 1)
        return float(step(State(x, m, last, (h1, h2)))), float(scheduler.last_sample)

    alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[INDEX].double())
    data = Linear(float(1 / alpha), float(-sigma / alpha))
    responses = {"D": response(1), "anchor": response(2), "hist1": response(3), "hist2": response(4)}
    responses["D"] = (responses["D"][0] / data.m, responses["D"][1] / data.m)
    new_x = {name: value for name, (value, _) in responses.items()}
    corrected = {name: value for name, (_, value) in responses.items()}
    return _row(data, new_x, corrected)


def _row(data: Linear, new_x: dict[str, float], anchor: dict[str, float]) -> Array:
    row = np.zeros(ROW_SIZE)
    row[PREDICTION], row[CLIP] = (data.x, data.m), np.inf
    for block, coefficients in ((NEW_X, new_x), (NEW_HISTORY, {"D": 1.0}), (NEW_ANCHOR, anchor)):
        row[block] = [coefficients.get(name, 0.0) for name in INPUTS]
    return row


_CASES: dict[str, Callable[[], tuple[Array, Step | None]]] = {"ddim": _ddim, "dpmpp_2m": _dpmpp_2m, "unipc": _unipc}
