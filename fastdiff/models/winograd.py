"""Where a 3x3 convolution on the CPU is made by Winograd's filtering, and in which tiles.

Y = A^T [(G g G^T) * (B^T d B)] A: m x m results of a filter g from (m + 2) x (m + 2) pixels d, by (m + 2)^2 products
instead of 9 m^2 (Lavin & Gray, arXiv:1509.09308, section 4). A pixel that is not finite spoils its
whole tile, and one that is a million times as large as the others takes their digits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

__all__ = ["filters", "tile"]

_LANES, _BLOCK = 16, 32
"""Channels are filled up to a multiple of the one, outputs to one of the other."""
_TRANSFORMS = {2: (16, 80, 90), 4: (36, 200, 200)}
"""For each size of a tile: its products; what transforming it costs, as products, on the way in and on the way out; and
what transforming a weight costs."""
_FEWEST_CHANNELS = 128
"""For tiles of 4: below, sums are so short that the transforms would make most of the rounding error."""
_FEWEST_TILES = 16
"""For bfloat16: below, transforming weights takes longer than what it saves."""
_FEWEST = 32
"""Channels and outputs, for bfloat16: with fewer there is little but transforms."""
_KEPT = 4096
"""Answers of each function that are remembered: finding one takes as long as a small layer."""
_GAIN = 0.9
"""Tiles of 4 round twice as much as tiles of 2, so that they have to gain something."""


@lru_cache(_KEPT)
def tile(shape: tuple[int, ...], outputs: int, geometry: tuple[Any, ...], *, doubled: bool = False) -> int:
    """Results in a row and a column of a tile, 2 or 4; 0 where the convolution is made directly.

    shape: of the map (N, C, H, W), which is convolved at twice its size where `doubled`; geometry: taps, stride,
    padding, dilation, groups. Costs are counted in multiplications of vectors.
    """
    height, width = _result(shape, geometry, doubled)
    if height < 1 or width < 1:
        return 0
    samples, channels = shape[:2]
    # Twice the size: the four phases of 2x2 taps that take its place.
    best, cost = 0, (4 if doubled else 9) * samples * height * width * channels * -(-outputs // _LANES)
    into, out = -(-channels // _LANES), -(-outputs // _BLOCK) * _BLOCK // _LANES
    for size, (products, transform, weight) in _TRANSFORMS.items():
        tiles = samples * -(-height // size) * -(-width // size)
        own = (products * tiles + weight) * into * _LANES * out + transform * tiles * (into + out)
        if size == 4 and channels < _FEWEST_CHANNELS:
            continue
        if own < (_GAIN if best else 1) * cost:
            best, cost = size, own
    return best


@lru_cache(_KEPT)
def filters(shape: tuple[int, ...], outputs: int, geometry: tuple[Any, ...], *, doubled: bool = False) -> bool:
    """Whether a convolution of bfloat16 is made in tiles of 2 x 2 results; its weights lie in pairs of channels."""
    height, width = _result(shape, geometry, doubled)
    if height < 1 or width < 1 or (doubled and tuple(geometry[2]) != (1, 1)):
        return False
    tiles = shape[0] * -(-height // 2) * -(-width // 2)
    return tiles >= _FEWEST_TILES and min(shape[1], outputs) >= _FEWEST and shape[1] % 2 == 0


def _result(shape: tuple[int, ...], geometry: tuple[Any, ...], doubled: bool) -> tuple[int, int]:
    """Height and width of what a 3x3 convolution of stride 1 gives; zeros for any other."""
    taps, stride, padding, dilation, groups = geometry
    if (tuple(taps), tuple(stride), tuple(dilation), groups) != ((3, 3), (1, 1), (1, 1), 1):
        return 0, 0
    height, width = ((1 + doubled) * size + 2 * pad - 2 for size, pad in zip(shape[2:], padding, strict=True))
    return height, width
