"""What the tests of convolutions share: backends, inputs, and what networks write for the doubling ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from backends import DEVICE
from inputs import normal
from torch import Tensor
from torch.nn import functional as F

BACKENDS = {**DEVICE, "reference": "cpu"}
"""And where each runs."""


@dataclass(frozen=True)
class Shape:
    """Of a 3x3 convolution of stride 1."""

    batch: int
    channels: int
    outputs: int
    height: int
    width: int
    padding: tuple[int, int] = (1, 1)

    def __str__(self) -> str:
        padding = "" if self.padding == (1, 1) else "-padding-{}x{}".format(*self.padding)
        return f"{self.batch}x{self.channels}to{self.outputs}x{self.height}x{self.width}{padding}"

    def layer(self, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        size = self.height, self.width
        return layer(self.batch, self.channels, self.outputs, size, dtype=dtype, mean=mean)


def layer(
    batch: int,
    channels: int,
    outputs: int,
    size: tuple[int, int],
    taps: tuple[int, int] = (3, 3),
    *,
    dtype: torch.dtype = torch.float32,
    mean: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, and weight and bias of a convolution whose results are as large as x."""
    x = normal(batch, channels, *size, dtype=dtype, mean=mean)
    weight = normal(outputs, channels, *taps, seed=1, dtype=torch.float64)
    return x, (weight / math.sqrt(weight[0].numel())).to(dtype), normal(outputs, seed=2, dtype=dtype)


def doubled_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int] = (1, 1)) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=padding)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
