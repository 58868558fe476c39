"""Checks of the operators' arguments: each names the argument, what was expected, what came, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.ops.row import ROW_SIZE

_FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))
MAX_HEAD_DIM = 256


def _floating(name: str, argument: str, value: Tensor) -> None:
    if value.dtype not in _FLOATS:
        raise InputError(f"{name}: {argument} is {value.dtype}; expected float32, float16, bfloat16 or float64")


def _same_device(name: str, x: Tensor, **others: Tensor | None) -> None:
    for argument, value in others.items():
        if value is not None and value.device != x.device:
            raise InputError(
                f"{name}: {argument} is on {value.device}, the first tensor on {x.device}; move one of them"
            )


def _shape(name: str, argument: str, value: Tensor, expected: Sequence[int]) -> None:
    if value.shape != expected:
        raise InputError(f"{name}: {argument} has shape {tuple(value.shape)}; expected {tuple(expected)}")


def _seeds(name: str, seeds: Tensor, samples: int) -> None:
    if seeds.dtype != torch.int64 or seeds.dim() != 1 or seeds.shape[0] != samples:
        raise InputError(
            f"{name}: seeds is {seeds.dtype} of shape {tuple(seeds.shape)}; expected int64 ({samples},), one per sample"
        )
    if not seeds.is_contiguous():
        raise InputError(f"{name}: seeds is not contiguous; pass seeds.contiguous()")


def sampler_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    counter: Tensor | None,
    anchor: Tensor | None,
    history: Sequence[Tensor],
    noise: Tensor | None,
    seeds: Tensor | None,
    weights: Tensor | None,
) -> None:
    name = "sampler_step"
    shape = prediction(name, x, model_output, table, row, counter, weights)
    if history or anchor is not None:
        device = x.device
        if len(history) > 3:
            raise InputError(f"{name}: history has {len(history)} tensors; expected at most 3, newest first")
        for value in history if anchor is None else (anchor, *history):
            if value.shape != shape or value.device != device or not value.is_contiguous():
                raise InputError(
                    f"{name}: anchor or history has shape {tuple(value.shape)} on {value.device}; "
                    f"expected contiguous {tuple(shape)} on {device}"
                )
            if value.dtype != torch.float32 and not value.dtype == x.dtype == torch.float64:
                raise InputError(f"{name}: anchor or history is {value.dtype}; expected float32")
    if noise is not None:
        _like_state("noise", noise, x)
    if seeds is not None:
        _seeds(name, seeds, shape[0])
        _same_device(name, x, seeds=seeds)


def prediction(
    name: str,
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    counter: Tensor | None,
    weights: Tensor | None,
) -> torch.Size:
    """What a step and the operators before it make D of; gives x's shape, which takes time to ask for again."""
    shape, columns = x.shape, table.shape
    if x.dtype not in _FLOATS or model_output.dtype not in _FLOATS:
        _floating(name, "x", x)
        _floating(name, "model_output", model_output)
    if not shape or x.numel() == 0:
        raise InputError(f"{name}: x has shape {tuple(shape)}; expected (N, ...) with at least one element")
    if weights is not None or model_output.shape != shape:
        _groups(name, x, model_output, weights)
    if table.dtype != torch.float32 or len(columns) != 2 or columns[1] != ROW_SIZE or not table.is_contiguous():
        raise InputError(
            f"{name}: table is {table.dtype} of shape {tuple(columns)}; expected contiguous float32 (rows, {ROW_SIZE})"
        )
    if not 0 <= row < columns[0]:
        raise InputError(f"{name}: row {row} is outside the table's {columns[0]} rows")
    device = x.device
    if model_output.device != device or table.device != device:
        _same_device(name, x, model_output=model_output, table=table)
    if counter is not None:
        if counter.dtype != torch.int64 or counter.numel() != 1:
            raise InputError(f"{name}: counter is {counter.dtype} of {counter.numel()} elements; expected int64 (1,)")
        _same_device(name, x, counter=counter)
    return shape


def sampler_step_options(
    x: Tensor,
    scales: Tensor | None,
    known: Tensor | None,
    known_noise: Tensor | None,
    mask: Tensor | None,
    copies: int | None,
) -> None:
    """Those that most steps do without; called where there is one."""
    if scales is not None:
        meaning = "bound, data factor, noise factor"
        _rows_of_samples("sampler_step", "scales", scales, x, (x.shape[0], 3), meaning)
    if known is not None or mask is not None or known_noise is not None:
        _step_known(x, known, known_noise, mask)
    if copies is not None and copies < 1:
        raise InputError(
            f"sampler_step: copies is {copies}; expected at least 1, or None for the groups of model_output"
        )


def _groups(name: str, x: Tensor, model_output: Tensor, weights: Tensor | None) -> None:
    """The model output's shape where it is not simply x's: G groups of the batch, variance channels."""
    shape, output = x.shape, model_output.shape
    fits = len(output) == len(shape) and output[0] % shape[0] == 0 and output[0] > 0
    if fits and len(shape) > 1:
        fits = output[2:] == shape[2:] and (output[1] == shape[1] or output[1] == 2 * shape[1])
    if not fits:
        raise InputError(
            f"{name}: model_output has shape {tuple(output)}; expected {tuple(shape)}, "
            f"or {(2 * shape[0], *shape[1:])} = [uncond; cond], or more groups with weights, "
            "each with x's channels or twice as many"
        )
    groups = output[0] // shape[0]
    if weights is not None:
        group_weights(name, weights, x, (shape[0], groups))
    elif groups > 2:
        raise InputError(
            f"{name}: model_output has {groups} groups of {shape[0]} samples and there are no weights; "
            f"pass weights ({shape[0]}, {groups})"
        )


def group_weights(name: str, weights: Tensor, like: Tensor, shape: tuple[int, int]) -> None:
    _rows_of_samples(name, "weights", weights, like, shape, "one weight for each group of model_output")


def _step_known(x: Tensor, known: Tensor | None, known_noise: Tensor | None, mask: Tensor | None) -> None:
    """What is kept of an image, and where."""
    name, shape = "sampler_step", x.shape
    if known is None or mask is None:
        absent = "known" if known is None else "mask"
        raise InputError(f"{name}: known and mask come together; pass {absent}, or neither of them nor known_noise")
    _like_state("known", known, x)
    if known_noise is not None:
        _like_state("known_noise", known_noise, x)
    fits = mask.dim() == len(shape) and mask.shape[2:] == shape[2:]
    if not fits or any(have not in (1, want) for have, want in zip(mask.shape[:2], shape[:2], strict=True)):
        expected = ", ".join([f"1 or {size}" for size in shape[:2]] + [str(size) for size in shape[2:]])
        raise InputError(f"{name}: mask has shape {tuple(mask.shape)}; expected ({expected})")
    if mask.dtype != torch.float32:
        raise InputError(f"{name}: mask is {mask.dtype}; expected float32, 1 where the sample is made; convert it")
    if mask.device != x.device:
        _same_device(name, x, mask=mask)


def _like_state(argument: str, value: Tensor, x: Tensor) -> None:
    """A floating tensor of x's shape and device."""
    if value.dtype == x.dtype and value.shape == x.shape and value.device == x.device and x.dtype in _FLOATS:
        return
    _floating("sampler_step", argument, value)
    if value.dtype == torch.float64 and x.dtype != torch.float64:
        raise InputError(f"sampler_step: {argument} is float64, x is {x.dtype}; convert one of them")
    _shape("sampler_step", argument, value, x.shape)
    _same_device("sampler_step", x, **{argument: value})


def _rows_of_samples(
    name: str, argument: str, value: Tensor, like: Tensor, shape: tuple[int, int], meaning: str
) -> None:
    """A contiguous float32 (N, K) on the device of `like`; or float64 where that is."""
    fits = value.shape == shape and value.is_contiguous()
    if not fits or (value.dtype != torch.float32 and not value.dtype == like.dtype == torch.float64):
        raise InputError(
            f"{name}: {argument} is {value.dtype} of shape {tuple(value.shape)}; "
            f"expected contiguous float32 {shape}: {meaning}"
        )
    _same_device(name, like, **{argument: value})


def _word(name: str, argument: str, value: int) -> None:
    if not 0 <= value < 2**32:
        raise InputError(f"{name}: {argument} is {value}; expected an integer from 0 to 2^32 - 1")


def add_noise(
    x: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | None, seeds: Tensor | None, step: int, stream: int
) -> None:
    name = "add_noise"
    _floating(name, "x", x)
    if x.dim() == 0:
        raise InputError(f"{name}: x has no dimensions; expected (N, ...)")
    for argument, value in (("alpha", alpha), ("sigma", sigma)):
        wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
        if value.dtype not in (torch.float32, wanted) or value.shape != x.shape[:1] or not value.is_contiguous():
            raise InputError(
                f"{name}: {argument} is {value.dtype} of shape {tuple(value.shape)}; "
                f"expected contiguous float32 ({x.shape[0]},), one per sample"
            )
    if (noise is None) == (seeds is None):
        raise InputError(f"{name}: expected exactly one of noise and seeds, got {'none' if noise is None else 'both'}")
    if noise is not None:
        _floating(name, "noise", noise)
        _shape(name, "noise", noise, x.shape)
    if seeds is not None:
        _seeds(name, seeds, x.shape[0])
    _same_device(name, x, alpha=alpha, sigma=sigma, noise=noise, seeds=seeds)
    _word(name, "step", step)
    _word(name, "stream", stream)


def philox_normal(seeds: Tensor, shape: Sequence[int], step: int, stream: int, dtype: torch.dtype) -> None:
    name = "philox_normal"
    if dtype not in _FLOATS:
        raise InputError(f"{name}: dtype is {dtype}; expected float32, float16, bfloat16 or float64")
    if len(shape) == 0 or any(size < 0 for size in shape):
        raise InputError(f"{name}: shape is {tuple(shape)}; expected (N, ...) of sizes that are not negative")
    _seeds(name, seeds, shape[0])
    _word(name, "step", step)
    _word(name, "stream", stream)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    name = "attention"
    for argument, value in (("q", q), ("k", k), ("v", v)):
        _floating(name, argument, value)
        if value.dim() != 4:
            raise InputError(f"{name}: {argument} has shape {tuple(value.shape)}; expected (B, H, L, D)")
        if value.dtype != q.dtype:
            raise InputError(f"{name}: {argument} is {value.dtype}, q is {q.dtype}; expected one dtype")
    batch, heads, length, dim = q.shape
    if k.shape[:2] != (batch, heads) or k.shape[3] != dim:
        raise InputError(f"{name}: k has shape {tuple(k.shape)}; expected ({batch}, {heads}, Lk, {dim}) to fit q")
    _shape(name, "v", v, k.shape)
    if dim > MAX_HEAD_DIM or dim < 1:
        raise InputError(f"{name}: head dimension is {dim}; expected 1 to {MAX_HEAD_DIM}")
    if length == 0 or k.shape[2] == 0:
        raise InputError(f"{name}: Lq={length} and Lk={k.shape[2]}; expected at least one query and one key")
    if mask is not None:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise InputError(f"{name}: mask is {mask.dtype}; expected bool (True = attend) or a floating dtype (added)")
        full = (batch, heads, length, k.shape[2])
        if mask.dim() > 4 or any(
            have not in (1, want) for have, want in zip(reversed(mask.shape), reversed(full), strict=False)
        ):
            raise InputError(f"{name}: mask has shape {tuple(mask.shape)}; expected one broadcastable to {full}")
    _same_device(name, q, k=k, v=v, mask=mask)
