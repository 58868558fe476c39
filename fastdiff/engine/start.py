"""How a run begins: from noise, from a state, from an image; and what it keeps of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.noise import STREAM_INITIAL
from fastdiff.samplers.table import StepTable

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def batch_shape(shape: Sequence[int], samples: int, dtype: torch.dtype) -> tuple[int, ...]:
    """The shape; InputError where it is none of a batch of so many samples, or the dtype none that a network gets."""
    sizes = tuple(shape) if isinstance(shape, Sequence) else ()
    if not sizes or not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise InputError(f"shape: expected the positive sizes of the batch (N, ...), got {shape!r}")
    if sizes[0] != samples:
        raise InputError(f"seeds: expected {sizes[0]}, one per sample of shape {sizes}, got {samples}")
    if dtype not in DTYPES:
        raise InputError(f"dtype: expected one of {', '.join(map(str, DTYPES))}, got {dtype}")
    return sizes


@dataclass(frozen=True)
class Kept:
    """An image of the batch's shape and where it is kept: mask is 1 where the sample is made, None everywhere."""

    image: Tensor | None
    mask: Tensor | None


def keep(image: Tensor | None, mask: Tensor | None, table: StepTable, shape: tuple[int, ...], keys: Tensor) -> Kept:
    """The image and the mask as the step takes them; InputError where they do not fit the batch or the method."""
    if image is None:
        if mask is not None:
            raise InputError("mask: expected None without an image to keep; pass image")
        return Kept(None, None)
    if mask is not None and table.inverse:
        raise InputError(
            f"mask: expected None with {table.method}, which goes from a whole image to its noise and makes no part "
            "anew; leave it out"
        )
    _check("image", image, keys)
    if image.shape != shape:
        raise InputError(f"image: expected the batch's shape {shape}, got {tuple(image.shape)}")
    if image.dtype != torch.float32:
        raise InputError(f"image: expected float32, got {image.dtype}; convert it")
    return Kept(image.contiguous(), None if mask is None else _mask(mask, shape, keys))


def _mask(mask: Tensor, shape: tuple[int, ...], keys: Tensor) -> Tensor:
    """float32 (1 or N, 1 or C, *spatial)."""
    _check("mask", mask, keys)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InputError(f"mask: expected bool or floating, 1 where the sample is made, got {mask.dtype}; convert it")
    missing = len(shape) - mask.dim()
    full = (1,) * missing + tuple(mask.shape)
    if missing < 0 or any(have not in (1, want) for have, want in zip(full, shape, strict=True)):
        raise InputError(f"mask: expected a shape that broadcasts to {shape}, got {tuple(mask.shape)}")
    values = mask.reshape(full).to(torch.float32).expand(*full[:2], *shape[2:])
    return values.contiguous()


def _check(name: str, value: object, keys: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise InputError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.device != keys.device:
        raise InputError(f"{name}: expected a tensor on {keys.device}, got one on {value.device}; move it")


def state_or_noise(x: Tensor | None, shape: tuple[int, ...], keys: Tensor, scale: float) -> Tensor:
    """x, checked, or the samples' noise times the scale."""
    if x is None:
        return ops.philox_normal(keys, shape, stream=STREAM_INITIAL).mul_(scale)
    _check("x", x, keys)
    if x.shape != shape or x.dtype != torch.float32:
        raise InputError(f"x: expected float32 {shape}, got {x.dtype} {tuple(x.shape)}; convert it")
    return x


def begin(x: Tensor | None, kept: Kept, table: StepTable, shape: tuple[int, ...], keys: Tensor) -> Tensor:
    """The first state: x itself, the noised image, or noise."""
    signal, noise = table.init_level
    if x is not None or (kept.image is None and not table.inverse):
        return state_or_noise(x, shape, keys, table.init_scale)
    if kept.image is None:
        raise InputError(f"image: expected one with {table.method}, which goes from an image to its noise; pass image")
    if table.inverse:
        return signal * kept.image
    alpha, sigma = (torch.full((len(keys),), value, device=keys.device) for value in (signal, noise))
    noised = ops.add_noise(kept.image, alpha, sigma, seeds=keys)
    if kept.mask is None or table.grid.skipped > 0:
        return noised
    # Nothing of the image is to shine through where the sample is made.
    made = state_or_noise(None, shape, keys, table.init_scale)
    return torch.where(kept.mask == 0.0, noised, torch.lerp(noised, made, kept.mask))
