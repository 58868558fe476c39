"""Readers of image files: IDX, `.npz`, folders; each gives uint8 arrays (N, C, H, W) or says what is wrong."""

from __future__ import annotations

import gzip
import io
import itertools
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from fastdiff.errors import InputError

Array = npt.NDArray[Any]

_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif")
_IDX_UBYTE = 0x08


@dataclass(frozen=True, eq=False)
class RawImages:
    """images uint8 (N, C, H, W); labels whole numbers, not checked yet."""

    images: Array
    labels: Array | None = None
    class_names: tuple[str, ...] = ()


def read(path: Path, *, split: str = "train", size: int | None = None) -> RawImages:
    """Read what stands at `path`; `split` matters to IDX folders, `size` to folders of images.

    Errors: InputError.
    """
    if not path.exists():
        raise InputError(f"data: expected a folder, an .npz or an IDX file, got {path}, which does not exist")
    if path.is_dir():
        if any(path.glob("*-images-idx3-ubyte*")):
            return _read_idx_folder(path, split)
        return _read_image_folder(path, size)
    if path.suffix == ".npz":
        return _read_npz(path)
    if "idx3-ubyte" in path.name:
        return _read_idx_pair(path)
    raise InputError(f"data: expected a folder, an .npz or a file named *-images-idx3-ubyte[.gz], got {path}")


def read_idx(path: Path, *, dimensions: int) -> Array:
    """An IDX file of unsigned bytes: 00 00 08 d, d big-endian sizes, the bytes; gzip is recognised by its first bytes.

    Errors: InputError for another magic number, a truncated or overlong file.
    """
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); fetch the file again") from error
    expected = (0, _IDX_UBYTE, dimensions)
    header = 4 + 4 * dimensions
    if len(content) < header:
        raise InputError(f"{path}: expected an IDX header of {header} bytes, got {len(content)} bytes")
    magic = struct.unpack(">HBB", content[:4])
    if magic != expected:
        want = struct.unpack(">I", struct.pack(">HBB", *expected))[0]
        raise InputError(f"{path}: expected the IDX magic number 0x{want:08x}, got 0x{content[:4].hex()}")
    shape = struct.unpack(f">{dimensions}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise InputError(
            f"{path}: expected {math.prod(shape)} bytes after the header for shape {shape}, "
            f"got {len(content) - header}; the file is truncated or foreign"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _read_idx_folder(folder: Path, split: str) -> RawImages:
    for suffix in ("", ".gz"):
        path = folder / f"{split}-images-idx3-ubyte{suffix}"
        if path.exists():
            return _read_idx_pair(path)
    found = sorted({p.name.split("-images-")[0] for p in folder.glob("*-images-idx3-ubyte*")})
    raise InputError(f"data: expected {folder}/{split}-images-idx3-ubyte[.gz], got the splits {', '.join(found)}")


def _read_idx_pair(path: Path) -> RawImages:
    images = read_idx(path, dimensions=3)[:, None]
    stem = path.name.removesuffix(".gz").replace("-images-idx3-ubyte", "-labels-idx1-ubyte")
    for name in (stem, stem + ".gz"):
        if name != path.name and path.with_name(name).exists():
            labels = read_idx(path.with_name(name), dimensions=1)
            if len(labels) != len(images):
                raise InputError(f"{path.with_name(name)}: expected {len(images)} labels, got {len(labels)}")
            return RawImages(images, labels)
    return RawImages(images)


def _read_npz(path: Path) -> RawImages:
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: expected an .npz of plain arrays, which this is not ({error})") from error
    if "jpeg" in arrays and "offsets" in arrays:
        images = _decode_jpeg(path, arrays["jpeg"], arrays["offsets"])
    else:
        images = _channels_first(path, _first(arrays, ("x", "images"), path))
    labels = next((arrays[name] for name in ("labels", "y") if name in arrays), None)
    if labels is not None and labels.shape != (len(images),):
        raise InputError(f"{path}: expected {len(images)} labels, one for each image, got shape {labels.shape}")
    names = tuple(str(name) for name in arrays["classes"]) if labels is not None and "classes" in arrays else ()
    return RawImages(images, labels, names)


def _first(arrays: dict[str, Array], names: Iterable[str], path: Path) -> Array:
    for name in names:
        if name in arrays:
            return arrays[name]
    raise InputError(f"{path}: expected an array named {' or '.join(names)}, got {', '.join(sorted(arrays)) or 'none'}")


def _channels_first(path: Path, x: Array) -> Array:
    if x.dtype != np.uint8:
        raise InputError(f"{path}: expected uint8 images, got {x.dtype}; store them as 0..255")
    if x.ndim == 3:
        return x[:, None]
    if x.ndim == 4 and x.shape[3] in (1, 3, 4):
        return x.transpose(0, 3, 1, 2)
    if x.ndim == 4 and x.shape[1] in (1, 3, 4):
        return x
    raise InputError(f"{path}: expected (N, H, W), (N, H, W, C) or (N, C, H, W) with C of 1, 3 or 4, got {x.shape}")


def _decode_jpeg(path: Path, data: Array, offsets: Array) -> Array:
    content = data.tobytes()
    images = [
        _pixels(Image.open(io.BytesIO(content[a:b])), None, f"{path}: image {i}")
        for i, (a, b) in enumerate(itertools.pairwise(offsets.tolist()))
    ]
    return _stacked(path, images)


def _read_image_folder(folder: Path, size: int | None) -> RawImages:
    def images_in(place: Path) -> list[Path]:
        return sorted(p for p in place.iterdir() if p.suffix.lower() in _IMAGE_SUFFIXES)

    classes = sorted(p for p in folder.iterdir() if p.is_dir() and images_in(p))
    flat = images_in(folder)
    if classes and flat:
        raise InputError(f"{folder}: expected images in sub-folders (classes) or beside each other, got both")
    paths = [p for place in classes for p in images_in(place)] or flat
    if not paths:
        raise InputError(f"{folder}: expected IDX files or images ({', '.join(_IMAGE_SUFFIXES)}), got neither")
    images = _stacked(folder, [_opened(p, size) for p in paths])
    if not classes:
        return RawImages(images)
    labels = np.repeat(np.arange(len(classes)), [len(images_in(place)) for place in classes])
    return RawImages(images, labels, tuple(place.name for place in classes))


def _opened(path: Path, size: int | None) -> Array:
    try:
        with Image.open(path) as image:
            return _pixels(image, size, str(path))
    except (OSError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image ({error})") from error


def _pixels(image: Image.Image, size: int | None, name: str) -> Array:
    """uint8 (C, H, W): one channel for a grey image, three for any other."""
    try:
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    except OSError as error:
        raise InputError(f"{name}: cannot be read as an image ({error})") from error
    if size is not None:
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _stacked(path: Path, images: list[Array]) -> Array:
    channels = max(image.shape[0] for image in images)
    sizes = {image.shape[1:] for image in images}
    if len(sizes) > 1:
        raise InputError(f"{path}: expected images of one size, got {len(sizes)} sizes; pass --size to resize them")
    # Grey images among coloured ones become coloured.
    return np.stack([np.broadcast_to(image, (channels, *image.shape[1:])) for image in images])


def fit(image: Array, size: int) -> Array:
    """The central square of a uint8 image (C, H, W), resized to (C, size, size), channel by channel."""
    fitted = [ImageOps.fit(Image.fromarray(c), (size, size), method=Image.Resampling.LANCZOS) for c in image]
    return np.stack([np.asarray(channel) for channel in fitted])
