"""The noise in float64 from the words of Philox: the truth for philox_normal and for what draws its noise."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdiff.ops import reference


def box_muller(words: tuple[Tensor, ...]) -> Tensor:
    """The four normals of each block's words, in the last dimension."""
    values = []
    for w, v in (words[:2], words[2:]):
        radius = torch.sqrt(-2.0 * torch.log((w.double() + 0.5) / 2**32))
        turn = v.double() / 2**32
        values += [radius * torch.cos(2 * math.pi * turn), radius * torch.sin(2 * math.pi * turn)]
    return torch.stack(values, dim=-1)


def normals_truth(seeds: Tensor, shape: tuple[int, ...], step: int = 0, stream: int = 0) -> Tensor:
    """philox_normal in float64, not rounded."""
    count = math.prod(shape[1:])
    blocks = torch.arange((count + 3) // 4).expand(len(seeds), -1)
    normals = box_muller(reference.philox_words(seeds[:, None], blocks, step, stream))
    return normals.reshape(len(seeds), -1)[:, :count].reshape(shape)
