"""What `fastdiff sample` writes: a grid of images as .png, or the numbers as .npz; whole or not at all."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastdiff.errors import InputError
from fastdiff.files import write_atomic

SUFFIXES = (".png", ".npz")
GAP = 2
"""Pixels between the images of a grid."""
LEGIBLE = 64
"""Images smaller than this many pixels are drawn larger in a grid, each pixel as a square."""

Images = npt.NDArray[np.float32]


def check_path(path: Path) -> None:
    """InputError unless a file of that name could be written now."""
    if path.suffix.lower() not in SUFFIXES:
        raise InputError(f"out: expected a name ending in {' or '.join(SUFFIXES)}, got {path}")
    check_file("out", path)


def check_file(name: str, path: Path) -> None:
    """InputError unless a file could be written there now; name: the option that asks for it."""
    if path.is_dir():
        raise InputError(f"{name}: expected the name of a file, got the folder {path}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(
            f"{name}: {path} cannot be written ({error.strerror}); choose a path in a folder you can write to"
        ) from error


def check_shape(path: Path, shape: Sequence[int]) -> None:
    """InputError unless samples of that shape (C, H, W) can be written as this kind of file."""
    if path.suffix.lower() == ".png" and (len(shape) != 3 or shape[0] not in (1, 3)):
        raise InputError(f"out: expected a name ending in .npz, since samples of shape {tuple(shape)} are no images")


def write(path: Path, images: Images, *, columns: int, labels: Sequence[int] | None, seeds: Sequence[int]) -> None:
    """Write images (N, C, H, W) in [-1, 1]; an .npz holds `images`, `seeds` and, where there are any, `labels`."""
    buffer = io.BytesIO()
    if path.suffix.lower() == ".png":
        grid(images, columns).save(buffer, format="png", optimize=True)
    else:
        arrays = {"images": images, "seeds": np.array(seeds)}
        if labels is not None:
            arrays["labels"] = np.array(labels)
        np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    write_atomic(path, buffer.getvalue())


def columns_for(count: int) -> int:
    """The fewest columns that `count` images fill, between a square's and twice as many; else a square's."""
    square = math.isqrt(count - 1) + 1
    return next((columns for columns in range(square, 2 * square + 1) if count % columns == 0), square)


def grid(images: Images, columns: int) -> Image.Image:
    """The images side by side, in rows of `columns`, parted by white lines; a place without an image is black."""
    count, channels, height, width = images.shape
    columns = min(columns, count)
    scale = max(1, math.ceil(LEGIBLE / max(height, width)))
    height, width = height * scale, width * scale
    rows = math.ceil(count / columns)
    size = rows * (height + GAP) + GAP, columns * (width + GAP) + GAP
    canvas = np.full((*size, channels), 255, dtype=np.uint8)
    pixels = np.round((images.transpose(0, 2, 3, 1) + 1.0) * 127.5).clip(0, 255).astype(np.uint8)
    drawn = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    for index in range(rows * columns):
        top = GAP + index // columns * (height + GAP)
        left = GAP + index % columns * (width + GAP)
        canvas[top : top + height, left : left + width] = drawn[index] if index < count else 0
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)
