"""The loop of every sampler with k-diffusion's interface: call the model, tell the callback, apply one row of a table.

The caller's sigmas are read once, before it begins; inside it nothing waits for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import trange

from fastdiff import ops
from fastdiff.engine.carried import Carried
from fastdiff.errors import InputError
from fastdiff.integrations import in_pytorch
from fastdiff.samplers.table import StepTable

Model = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], Any]
Draw = Callable[[int, int, torch.dtype], Tensor | None]
Given = Callable[[int], Tensor | None]


@dataclass(frozen=True, eq=False)
class Plan:
    """How a sampler takes its steps.

    table         its rows, one for each call of the model, of states x = x_0 + sigma epsilon
    counts        (steps,) how many rows each step has
    promotes      (rows,) whether the state after the row takes the dtype of sigmas into account: whether the step is
                  one that divides by sigma as a tensor with dimensions, as `to_d` does
    gammas        (steps,) by how much of itself churn raises each level; empty: by nothing
    first_noise   how much noise takes the state to the first raised level
    returns_data  whether the last step gives the model's output itself
    """

    table: StepTable
    counts: tuple[int, ...]
    promotes: tuple[bool, ...]
    gammas: tuple[float, ...] = ()
    first_noise: float = 0.0
    returns_data: bool = False


class Rows:
    """A state on its way through a table: history and anchor, and one operator for each row."""

    def __init__(self, table: StepTable, device: torch.device) -> None:
        self._carried, self._coefficients = Carried(table), table.tensor(device)

    def apply(
        self, row: int, x: Tensor, denoised: Tensor, *, noise: Tensor | None = None, anchor: Tensor | None = None
    ) -> Tensor:
        """The state after the row, in x's dtype and contiguous.

        noise    standard normal; not read where the row adds none
        anchor   what the row reads as its anchor, in place of what an earlier row wrote: any dtype and layout
        """
        table, inputs = self._carried.table, self._carried.inputs(row)
        if anchor is not None and table.uses[row].anchor:
            inputs["anchor"] = anchor.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
        inputs["noise"] = noise if table.uses[row].noise else None
        if x.dtype == torch.float64:
            step = in_pytorch.sampler_step(table, row, x, denoised, **inputs)
        else:
            step = ops.sampler_step(x, denoised, self._coefficients, row, **inputs)
        self._carried.keep(step.history, step.anchor)
        return step.x


def run(
    model: Model,
    x: Tensor,
    sigmas: Tensor | Sequence[Tensor],
    plan: Plan,
    steps: Iterable[int],
    *,
    extra_args: dict[str, Any] | None = None,
    callback: Callback | None = None,
    draw: Draw | None = None,
    given: Given | None = None,
) -> Tensor:
    """The state after all steps: for each row D = model(x, sigma * ones, **extra_args), x' = row applied to (x, D).

    sigmas     one level for each step, and the last: a tensor, or tensors without dimensions. They are handed on to the
               model and the callback, and not read.
    steps      the numbers of the steps, 0, 1 ..., as a progress bar gives them
    callback   told {'x', 'i', 'sigma', 'sigma_hat', 'denoised'} after the first call of each step
    draw       (step, call within the step, the dtype that the state will have) -> the noise of that row; called for
               every row, after the model and the callback, so that it draws as often as it likes
    given      (row) -> the anchor of that row, such as a second prediction that came with the model's call; None leaves
               the anchor as it is

    The result has the dtype that PyTorch's promotion gives the same arithmetic done term by term.
    Errors: InputError where the model's output does not fit the state.
    """
    arguments = {} if extra_args is None else extra_args
    s_in, rows = x.new_ones([x.shape[0]]), Rows(plan.table, x.device)
    inner = _levels(plan, sigmas[0]) if max(plan.counts, default=1) > 1 else None
    row, last = 0, len(plan.table) - 1
    for i in steps:
        sigma = sigmas[i]
        sigma_hat = sigma * (plan.gammas[i] + 1) if plan.gammas else sigma
        for call in range(plan.counts[i]):
            level = sigma_hat if call == 0 or inner is None else inner[row]
            denoised = model(x, level * s_in, **arguments)
            check_output(denoised, x)
            if call == 0 and callback is not None:
                callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma_hat, "denoised": denoised})
            if plan.returns_data and row == last:
                return denoised
            dtype = torch.promote_types(x.dtype, denoised.dtype)
            if plan.promotes[row]:
                dtype = torch.promote_types(dtype, sigma.dtype)
            noise = None if draw is None else draw(i, call, dtype)
            if noise is not None:
                dtype = torch.promote_types(dtype, noise.dtype)
            anchor = None if given is None else given(row)
            x = rows.apply(row, x.to(dtype), denoised, noise=noise, anchor=anchor)
            row += 1
    return x


def _levels(plan: Plan, like: Tensor) -> Tensor:
    """The level of every row's call of the model."""
    return torch.tensor(plan.table.levels[:, 1], dtype=like.dtype, device=like.device)


def check_output(denoised: object, x: Tensor) -> None:
    """InputError where the model gave no prediction for the state."""
    if not isinstance(denoised, Tensor) or denoised.shape != x.shape:
        got = tuple(denoised.shape) if isinstance(denoised, Tensor) else type(denoised).__name__
        raise InputError(
            f"model: expected a data prediction of x's shape {tuple(x.shape)}, got {got}; wrap a network that predicts "
            "noise or v in one of fastdiff.integrations.k_diffusion.external"
        )


def read_levels(sigmas: Tensor, *, falling: bool = False) -> tuple[float, ...]:
    """The caller's sigmas as numbers; this waits for their device.

    Errors: InputError for what is not a row of positive numbers, of which the last may be 0; where they have to be
    `falling`, for one that is larger than the one before.
    """
    if not isinstance(sigmas, Tensor) or sigmas.dim() != 1 or not sigmas.is_floating_point() or len(sigmas) == 0:
        got = f"{sigmas.dtype} {tuple(sigmas.shape)}" if isinstance(sigmas, Tensor) else type(sigmas).__name__
        raise InputError(f"sigmas: expected a floating tensor (steps + 1,), such as get_sigmas_karras gives, got {got}")
    levels = tuple(sigmas.detach().double().tolist())
    if not all(0.0 < level < math.inf for level in levels[:-1]) or not 0.0 <= levels[-1] < math.inf:
        raise InputError(f"sigmas: expected positive numbers of which the last may be 0, got {list(levels)}")
    if falling and any(to > since for since, to in pairwise(levels)):
        raise InputError(f"sigmas: expected falling numbers for a sampler that adds noise, got {list(levels)}")
    return levels


def read_ends(sigma_min: Any, sigma_max: Any, eta: float) -> tuple[Tensor, Tensor]:
    """-log of sigma_max and of sigma_min, where the run begins and ends, on the host.

    Errors: InputError where one is no positive number, or eta fits no run that goes up.
    """
    ends = []
    for name, value in (("sigma_max", sigma_max), ("sigma_min", sigma_min)):
        number = isinstance(value, int | float | Tensor) and not isinstance(value, bool)
        end = torch.as_tensor(value).detach().cpu() if number else None
        if end is None or end.numel() != 1 or not 0.0 < end.item() < math.inf:
            raise InputError(f"{name}: expected a positive number, got {value!r}")
        ends.append(end.reshape(()) if end.is_floating_point() else end.reshape(()).float())
    if ends[1] >= ends[0] and eta:
        raise InputError(f"eta: expected 0 for a run from {sigma_max} up to {sigma_min}, got {eta!r}")
    return -ends[0].log(), -ends[1].log()


def steps_of(levels: Sequence[float], disable: bool | None) -> Iterable[int]:
    """The numbers of the steps, with a progress bar."""
    return trange(len(levels) - 1, disable=disable)


def begin(x: Tensor, sigmas: Tensor, *, falling: bool = False) -> tuple[float, ...]:
    """`check_state` and `read_levels`."""
    check_state(x)
    return read_levels(sigmas, falling=falling)


def check_state(x: Tensor) -> None:
    """InputError where x is no batch of states."""
    if not isinstance(x, Tensor) or x.dim() == 0 or not x.is_floating_point():
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InputError(f"x: expected a floating tensor (N, ...), got {got}")
