"""Halving and doubling a feature map through the filter [1, 3, 3, 1] / 8 along each side, the same for every channel.

Source: Karras et al., "Analyzing and Improving the Image Quality of StyleGAN", 2020, appendix B, after Zhang, "Making
Convolutional Networks Shift-Invariant Again", 2019.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["filter_down", "filter_up"]


def filter_down(x: Tensor, *, reflect: bool = False) -> Tensor:
    """(N, C, H, W) -> (N, C, H // 2, W // 2). Outside the map are zeros, or its mirror image."""
    if reflect:
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return F.conv2d(x, _filter(x), stride=2, padding=0 if reflect else 1, groups=x.shape[1])


def filter_up(x: Tensor, *, reflect: bool = False) -> Tensor:
    """(N, C, H, W) -> (N, C, 2 H, 2 W), of the same brightness. Outside the map are zeros, or its mirror image."""
    if reflect:
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
    return F.conv_transpose2d(x, 4 * _filter(x), stride=2, padding=3 if reflect else 1, groups=x.shape[1])


def _filter(x: Tensor) -> Tensor:
    """(C, 1, 4, 4), made on the map's own device: copying it there would wait for the device."""
    taps = 4 - (2 * torch.arange(4, dtype=x.dtype, device=x.device) - 3).abs()
    return (taps[:, None] * taps / 64).expand(x.shape[1], 1, 4, 4)
