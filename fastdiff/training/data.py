"""Image sets as uint8 tensors (N, C, H, W) with int64 labels (N,): IDX files, `.npz` archives, folders of images."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.training import readers


@dataclass(frozen=True, eq=False)
class ImageSet:
    """images uint8 (N, C, size, size); labels int64 (N,), each below num_classes; class_names, one for each, or ().

    Without labels, labels and num_classes are None.
    """

    images: Tensor
    labels: Tensor | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        _, c, h, w = self.images.shape
        return (c, h, w)

    def fingerprint(self) -> str:
        """SHA-256 of the pixels and labels: whether a resumed run sees the data it began with."""
        digest = hashlib.sha256(repr(tuple(self.images.shape)).encode())
        digest.update(self.images.contiguous().numpy().data)
        if self.labels is not None:
            digest.update(self.labels.contiguous().numpy().data)
        return digest.hexdigest()

    def subset(self, indices: Tensor) -> ImageSet:
        labels = None if self.labels is None else self.labels[indices]
        return replace(self, images=self.images[indices], labels=labels)


def load_images(
    path: str | Path, *, size: int | None = None, split: str = "train", class_names: Sequence[str] | None = None
) -> ImageSet:
    """The image set at `path`: a folder of IDX files, one IDX file of images, an `.npz`, or a folder of images.

    size         every image is cropped to its central square and resized to size x size; None keeps square images
    split        which `<split>-images-idx3-ubyte[.gz]` of a folder with IDX files
    class_names  overrides the names found in the data (folder names, `classes` of an `.npz`)

    Errors: InputError for a missing, truncated or foreign file, labels that do not fit, images that are not square.
    """
    if size is not None and size < 1:
        raise InputError(f"size: expected a positive number of pixels, got {size}")
    raw = readers.read(Path(path), split=split, size=size)
    if len(raw.images) == 0:
        raise InputError(f"{path}: expected at least one image, got none")
    images = torch.from_numpy(_square(path, raw.images, size))
    if raw.labels is None:
        if class_names is not None:
            raise InputError(f"class names: expected data with labels, got {path}, which has none; leave the names out")
        return ImageSet(images)
    names = raw.class_names if class_names is None else tuple(class_names)
    labels = _checked_labels(path, raw.labels, len(images), names)
    return ImageSet(images, labels, len(names) or int(labels.max()) + 1, names)


def _checked_labels(path: str | Path, labels: readers.Array, count: int, class_names: tuple[str, ...]) -> Tensor:
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise InputError(
            f"{path}: expected {count} whole-number labels, one for each image, got {labels.dtype} {labels.shape}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0:
        raise InputError(f"{path}: expected labels counted from 0, got {low}")
    if class_names and high >= len(class_names):
        raise InputError(
            f"{path}: got label {high}, but only {len(class_names)} class names; give a name for each label"
        )
    return torch.from_numpy(labels.astype(np.int64))


def _square(path: str | Path, images: readers.Array, size: int | None) -> readers.Array:
    height, width = images.shape[2:]
    if size is None and height != width:
        raise InputError(f"{path}: expected square images, got {height}x{width}; pass --size to crop and resize them")
    if size is None or height == width == size:
        return np.array(images, order="C")
    return np.stack([readers.fit(image, size) for image in images])


def split_holdout(data: ImageSet, count: int, seed: int) -> tuple[ImageSet, ImageSet | None]:
    """(training part, held-out part of `count` images), the same for the same seed; None where count is 0.

    Errors: InputError unless 0 <= count < len(data).
    """
    if not 0 <= count < len(data):
        raise InputError(f"holdout: expected 0 to {len(data) - 1} of the {len(data)} images, got {count}")
    if count == 0:
        return data, None
    order = torch.from_numpy(np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(data)))
    return data.subset(order[count:].sort().values), data.subset(order[:count].sort().values)
