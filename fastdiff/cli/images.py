"""Images and masks that `fastdiff sample` starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from fastdiff.errors import InputError

MODES = {1: "L", 3: "RGB"}


def read_image(path: str | None, shape: Sequence[int]) -> Tensor | None:
    """The file as (C, H, W) in [-1, 1], resized to the model's own (C, H, W)."""
    if path is None:
        return None
    if len(shape) != 3 or shape[0] not in MODES:
        raise InputError(f"image: expected none, since samples of shape {tuple(shape)} are no images")
    return 2.0 * _read("image", path, MODES[shape[0]], shape) - 1.0


def read_mask(path: str | None, image: Tensor | None) -> Tensor | None:
    """The file as (1, H, W) in [0, 1], white where a new image is made."""
    if path is None:
        return None
    if image is None:
        raise InputError("mask: expected --image with it, the picture of which the black part is kept")
    return _read("mask", path, "L", image.shape)


def _read(name: str, path: str, mode: str, shape: Sequence[int]) -> Tensor:
    height, width = shape[1:]
    try:
        with Image.open(Path(path)) as file:
            picture = file.convert(mode).resize((width, height), Image.Resampling.LANCZOS)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is no image that Pillow reads"
        raise InputError(f"{name}: {path} cannot be read ({reason}); pass a .png or .jpg file") from None
    pixels = np.asarray(picture, dtype=np.float32) / 255.0
    return torch.from_numpy(pixels.reshape(height, width, -1).transpose(2, 0, 1).copy())
