"""A sampler's step in the middle of a run: diffusers' `scheduler.step` against the same row of a table.

The scheduler is put into the state it has at that step before every call, so that each call is the same step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.work import Work
from fastdiff import ops, samplers, schedules
from fastdiff.ops import reference
from fastdiff.parameterization import Linear
from fastdiff.samplers.table import make_row

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


def build(case: Case, device: torch.device) -> Work:
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(0)
    x, m, last, h1, h2 = (torch.randn(case.shape, generator=generator).to(device) for _ in range(5))
    # Sample, network output and last sample come in the case's dtype. The data predictions are float32 with us and in
    # the case's dtype with them; values that both can hold make the comparison exact.
    state = State(x.to(dtype), m.to(dtype), last.to(dtype).float(), (h1.to(dtype).float(), h2.to(dtype).float()))
    theirs = State(state.x, state.m, last.to(dtype), (h1.to(dtype), h2.to(dtype)))
    step, row = _CONTENDERS[case.variant]()
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
        return reference.sampler_step(x, m, table, 0, None, anchor, *older, None, None, False, False, None)[0]

    read = [state.x, state.m, *(state.history if uses_history else ()), *([state.last] if uses_anchor else ())]
    written = [state.x, *([state.last] if uses_history else ()), *([state.last] if uses_anchor else ())]
    return Work(
        peers={"diffusers": lambda: step(theirs)},
        ours=ours,
        truth=specified(state.x.double(), state.m.double()),
        plain=specified(state.x, state.m),
        traffic=sum(tensor.numel() * tensor.element_size() for tensor in (*read, *written)),
    )


def _scheduler(name: str, **options: Any) -> Any:
    import diffusers

    scheduler = getattr(diffusers, name)(**BETAS, **options)
    scheduler.set_timesteps(STEPS)
    return scheduler


def _table_row(method: str, **options: Any) -> Any:
    options = {**samplers.find(method).diffusers, **options}
    return samplers.build(method, schedule=schedules.scaled_linear(1000), steps=STEPS, **options).rows[INDEX]


def _ddim() -> tuple[Step, Any]:
    scheduler = _scheduler("DDIMScheduler", clip_sample=False)
    t = scheduler.timesteps[INDEX]

    def step(state: State) -> Tensor:
        return scheduler.step(state.m, t, state.x, return_dict=False)[0]

    return step, _table_row("ddim", clip=None)


def _dpmpp_2m() -> tuple[Step, Any]:
    scheduler = _scheduler("DPMSolverMultistepScheduler")
    t = scheduler.timesteps[INDEX]

    def step(state: State) -> Tensor:
        scheduler._step_index = INDEX
        scheduler.lower_order_nums = 2
        scheduler.model_outputs = [state.history[1], state.history[0]]
        return scheduler.step(state.m, t, state.x, return_dict=False)[0]

    return step, _table_row("dpmpp_2m")


def _unipc() -> tuple[Step, Any]:
    scheduler = _scheduler("UniPCMultistepScheduler")
    times = scheduler.timesteps

    def step(state: State) -> Tensor:
        scheduler._step_index = INDEX
        scheduler.lower_order_nums = scheduler.this_order = 2
        scheduler.model_outputs = [state.history[1], state.history[0]]
        scheduler.timestep_list = [times[INDEX - 2], times[INDEX - 1]]
        scheduler.last_sample = state.last
        return scheduler.step(state.m, times[INDEX], state.x, return_dict=False)[0]

    return step, _probed_row(scheduler, step)


def _probed_row(scheduler: Any, step: Step) -> Any:
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
    return make_row(data, new_x, history={"D": 1.0}, anchor=corrected)


_CONTENDERS: dict[str, Callable[[], tuple[Step, Any]]] = {"ddim": _ddim, "dpmpp_2m": _dpmpp_2m, "unipc": _unipc}
