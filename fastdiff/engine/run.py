"""The only sampling loop: call the network, apply one row of the table, never wait for the device."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from fastdiff import ops
from fastdiff.engine.carried import Carried
from fastdiff.engine.guidance import Guidance, Guide
from fastdiff.engine.start import Kept, batch_shape, begin, keep
from fastdiff.errors import InputError
from fastdiff.noise import seed_tensor
from fastdiff.samplers.table import StepTable

Denoiser = Callable[[Tensor, Tensor], Tensor]
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
    shape: Sequence[int] | None = None,
    seeds: Iterable[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    guidance: float | Guidance | None = None,
    x: Tensor | None = None,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    callback: Callable[[StepInfo], None] | None = None,
    progress: bool | None = None,
) -> Tensor:
    """Samples, float32 of that shape: for each row of the table m = denoiser(x, t), then x' = row applied to (x, m).

    denoiser    (x (N, ...) in `dtype`, t (N,) int64 or, where timesteps are not whole, float32) -> m, x's shape; twice
                its channels where the table's variance is learned. With guidance it gets the groups [uncond; cond] of
                the batch, (2N, ...).
    shape       of the batch, (N, ...); may be left out with x or image
    seeds       one integer per sample: its starting noise and the noise of its steps. A sample depends on its own seed
                and not on the rest of the batch, as far as the denoiser's arithmetic does not.
    guidance    a number: m = uncond + guidance * (cond - uncond); a `Guidance` says more
    x           the starting state instead of drawn noise, float32 of that shape, scaled as the method's state is
    image       what to start from, float32 of that shape, noised to the table's first level: image-to-image with a
                table built with `strength` below 1
    mask        inpainting: 1 where the sample is made, 0 where `image` is kept, between for a soft edge; bool or
                floating, of image's shape or one that broadcasts to it. After each step the kept part is the image at
                the step's own noise level, with the noise that the sample started from.
    callback    called with a `StepInfo` after each evaluation
    progress    a progress bar: True, False, or None for long runs on a terminal

    Errors: InputError for arguments that do not fit each other or a model output of another shape.
    """
    _check_callables(denoiser, callback)
    if not isinstance(table, StepTable):
        raise InputError(f"table: expected what fastdiff.samplers.build gives, got {table!r}")
    keys = seed_tensor(seeds, device_of(device))
    if shape is None:
        given = x if x is not None else image
        if not isinstance(given, Tensor):
            raise InputError("shape: expected the sizes of the batch (N, ...), got None; pass shape, x or image")
        shape = given.shape
    full = batch_shape(shape, len(keys), dtype)
    if guidance is not None and not isinstance(guidance, Guidance):
        guidance = Guidance(scale=guidance)
    with torch.inference_mode():
        guide = Guide(guidance, table, len(keys), keys.device)
        kept = keep(image, mask, table, full, keys)
        start = begin(x, kept, table, full, keys)
        samples = _loop(denoiser, guide, start, kept, keys, dtype, callback, progress)
    # A tensor made in inference mode could not be changed in place or recorded for gradients; its copy can.
    return samples.clone()


def _loop(
    denoiser: Denoiser,
    guide: Guide,
    x: Tensor,
    kept: Kept,
    keys: Tensor,
    dtype: torch.dtype,
    callback: Callable[[StepInfo], None] | None,
    progress: bool | None,
) -> Tensor:
    table, groups, rows = guide.table, guide.groups, len(guide.table)
    coefficients, times = table.tensor(x.device), _times(table, x.device)
    channels = x.shape[1] if x.dim() > 1 else 1
    model_input = torch.cat([(table.first_input_scale * x).to(dtype)] * groups[0])
    carried = Carried(table)
    for index in tqdm(range(rows), desc=table.method, unit="step", disable=not _shows(progress, rows), leave=False):
        last = index + 1 == rows
        t = times[index].expand(len(model_input))
        output = denoiser(model_input, t)
        _check_output(output, model_input.shape, table)
        output = guide.add_gradient(index, output, model_input, t)
        weights = guide.weights(index, output, channels)
        step = ops.sampler_step(
            x,
            output,
            coefficients,
            index,
            **carried.inputs(index),
            seeds=keys if table.uses[index].noise or kept.mask is not None else None,
            weights=weights,
            scales=_scales(table, index, x, output, coefficients, weights, keys),
            known=kept.image if kept.mask is not None else None,
            mask=kept.mask,
            model_input=None if last else dtype,
            copies=None if last else groups[index + 1],
        )
        x = step.x
        carried.keep(step.history, step.anchor)
        if step.model_input is not None:
            model_input = step.model_input
        if callback is not None:
            callback(StepInfo(index, rows, float(table.timesteps[index]), x, output))
    return x


def _scales(
    table: StepTable,
    row: int,
    x: Tensor,
    output: Tensor,
    coefficients: Tensor,
    weights: Tensor | None,
    keys: Tensor,
) -> Tensor | None:
    """What a row asks of each sample's own numbers: the size of a Langevin step, or a dynamic threshold."""
    if table.snr[row] > 0.0:
        snr = float(table.snr[row])
        return ops.langevin_step_size(x, output, coefficients, row, snr=snr, weights=weights, seeds=keys)
    if table.threshold is not None and table.uses[row].data:
        percentile, maximum = table.threshold.percentile, table.threshold.maximum
        return ops.dynamic_threshold(
            x, output, coefficients, row, percentile=percentile, maximum=maximum, weights=weights
        )
    return None


def device_of(name: torch.device | str) -> torch.device:
    """The device of that name; InputError if PyTorch knows none."""
    try:
        return torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"device: expected a device or its name, such as cpu or cuda, got {name!r}") from None


def _check_callables(denoiser: object, callback: object) -> None:
    if not callable(denoiser):
        raise InputError(f"denoiser: expected a function (x, t) -> m, got {denoiser!r}")
    if callback is not None and not callable(callback):
        raise InputError(f"callback: expected a function of a StepInfo or None, got {callback!r}")


def _check_output(output: object, given: torch.Size, table: StepTable) -> None:
    expected = (given[0], 2 * given[1], *given[2:]) if table.learned_variance else tuple(given)
    if not isinstance(output, Tensor) or output.shape != expected:
        got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(f"denoiser: expected an output of shape {expected}, got {got}")


@torch.inference_mode(False)
def _times(table: StepTable, device: torch.device) -> Tensor:
    """What the network is told, (R,): int64 where every timestep is whole, else float32.

    A network that remembers what it has made of them can only do so for a tensor that counts its versions.
    """
    times = torch.tensor(table.timesteps, dtype=torch.float64)
    whole = bool((times == times.round()).all())
    return times.to(torch.int64 if whole else torch.float32).to(device)


def _shows(progress: bool | None, rows: int) -> bool:
    return (rows >= LONG_RUN and sys.stderr.isatty()) if progress is None else progress
