"""Which 3x3 convolutions of bfloat16 on the CPU are made by Winograd's filtering, with weights transformed once."""

from __future__ import annotations

from typing import Any

__all__ = ["filters"]

_FEWEST = 32
"""Channels, and outputs; with fewer there is little but transforms."""


def filters(shape: tuple[int, ...], outputs: int, geometry: tuple[Any, ...], *, doubled: bool = False) -> bool:
    """Whether filtering a map of shape (N, C, H, W), or one of twice the size, is faster than a direct convolution.

    geometry: taps, stride, padding, dilation, groups.
    """
    taps, stride, padding, dilation, groups = geometry
    if (tuple(taps), tuple(stride), tuple(dilation), groups) != ((3, 3), (1, 1), (1, 1), 1):
        return False
    if doubled and tuple(padding) != (1, 1):
        return False
    if min(size * (1 + doubled) + 2 * pad for size, pad in zip(shape[2:], padding, strict=True)) < 3:
        return False
    return min(shape[1], outputs) >= _FEWEST
