"""The only sampling loop: call the network, apply one row of the table, never wait for the device."""

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.noise import STREAM_INITIAL, seed_tensor
from fastdiff.samplers.table import StepTable

Denoiser = Callable[[Tensor, Tensor], Tensor]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LONG_RUN = 10
"""Model evaluations from which progress=None shows a bar."""


@dataclass(frozen=True)
class StepInfo:
    """What a callback is told after each model evaluation.

    step            number of the evaluation, from 0; there are `steps` of them (two a step for Heun)
    timestep        what the network was called with
    x               the state after it, float32: the sample itself after the last one. Read it, do not write to it
    model_output    what the network gave; with guidance (2N, ...) = [uncond; cond]
    """

    step: int
    steps: int
    timestep: float
    x: Tensor
    model_output: Tensor


def run(
    denoiser: Denoiser,
    table: StepTable,
    *,
    shape: Sequence[int],
    seeds: Iterable[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    guidance: float | None = None,
    x: Tensor | None = None,
    callback: Callable[[StepInfo], None] | None = None,
    progress: bool | None = None,
) -> Tensor:
    """Samples, float32 of that shape: for each row of the table m = denoiser(x, t), then x' = row applied to (x, m).

    denoiser    (x (N, ...) in `dtype`, t (N,) int64 or, where timesteps are not whole, float32) -> m, x's shape.
                With guidance it gets 2N samples, [uncond; cond], and m = uncond + guidance * (cond - uncond).
    shape       of the batch, (N, ...)
    seeds       one integer per sample: its starting noise and the noise of its steps. A sample depends on its own seed
                and not on the rest of the batch, as far as the denoiser's arithmetic does not.
    x           the starting state instead of drawn noise, float32 of that shape, scaled as the method's state is
    callback    called with a `StepInfo` after each evaluation
    progress    a progress bar: True, False, or None for long runs on a terminal

    Errors: InputError for arguments that do not fit each other or a model output of another shape.
    """
    keys = seed_tensor(seeds, device)
    full = _batch_shape(shape, len(keys))
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
    if guidance is not None:
        if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not math.isfinite(guidance):
            raise InputError(f"guidance: expected a finite number or None, got {guidance!r}")
        table = table.with_guidance(guidance)
    with torch.inference_mode():
        start = _start(x, table, full, keys)
        samples = _loop(denoiser, table, start, keys, dtype, guidance is not None, callback, progress)
    # A tensor made in inference mode could not be changed in place or recorded for gradients; its copy can.
    return samples.clone()


def _loop(
    denoiser: Denoiser,
    table: StepTable,
    x: Tensor,
    keys: Tensor,
    dtype: torch.dtype,
    guided: bool,
    callback: Callable[[StepInfo], None] | None,
    progress: bool | None,
) -> Tensor:
    coefficients, times = table.tensor(x.device), _times(table, x.device)
    copies = 2 if guided else 1
    model_input = torch.cat([(table.first_input_scale * x).to(dtype)] * copies)
    expected = model_input.shape
    anchor: Tensor | None = None
    history: tuple[Tensor, ...] = ()
    rows = len(table)
    for index in tqdm(range(rows), desc=table.method, unit="step", disable=not _shows(progress, rows), leave=False):
        use = table.uses[index]
        output = denoiser(model_input, times[index].expand(expected[0]))
        if not isinstance(output, Tensor) or output.shape != expected:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(f"denoiser: expected an output of shape {tuple(expected)}, got {got}")
        step = ops.sampler_step(
            x,
            output,
            coefficients,
            index,
            anchor=anchor if use.anchor else None,
            history=history[: use.history],
            seeds=keys if use.noise else None,
            new_history=use.new_history,
            new_anchor=use.new_anchor,
            model_input=dtype if index + 1 < rows else None,
        )
        x = step.x
        if step.history is not None:
            history = (step.history, *history[:2])
        if step.anchor is not None:
            anchor = step.anchor
        if step.model_input is not None:
            model_input = step.model_input
        if callback is not None:
            callback(StepInfo(index, rows, float(table.timesteps[index]), x, output))
    return x


def _batch_shape(shape: Sequence[int], samples: int) -> tuple[int, ...]:
    sizes = tuple(shape)
    if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise InputError(f"shape: expected the positive sizes of the batch (N, ...), got {sizes}")
    if sizes[0] != samples:
        raise InputError(f"seeds: expected {sizes[0]}, one per sample of shape {sizes}, got {samples}")
    return sizes


def _start(x: Tensor | None, table: StepTable, shape: tuple[int, ...], keys: Tensor) -> Tensor:
    if x is None:
        return ops.philox_normal(keys, shape, stream=STREAM_INITIAL).mul_(table.init_scale)
    if x.shape != shape or x.dtype != torch.float32 or x.device != keys.device:
        raise InputError(
            f"x: expected float32 {shape} on {keys.device}, got {x.dtype} {tuple(x.shape)} on {x.device}; convert it"
        )
    return x


def _times(table: StepTable, device: torch.device) -> Tensor:
    """What the network is told, (R,): int64 where every timestep is whole, else float32."""
    times = torch.tensor(table.timesteps, dtype=torch.float64)
    whole = bool((times == times.round()).all())
    return times.to(torch.int64 if whole else torch.float32).to(device)


def _shows(progress: bool | None, rows: int) -> bool:
    return (rows >= LONG_RUN and sys.stderr.isatty()) if progress is None else progress
