"""How group_norm_silu cuts a tensor into tiles, slabs and chunks."""

from __future__ import annotations

from dataclasses import dataclass

import triton

TILE = 4096  # elements
WHOLE_TILE = 8192  # elements of a tile that holds all positions
WIDTH = 128  # of a tile along the contiguous dimension, where there is as much
MAX_GROUPS = 32  # of a slab: sums over a group go through a table of channels x groups
MAX_CHUNKS = 64  # of a sample, unless it is so long that each has 16 tiles


@dataclass(frozen=True)
class Plan:
    """How a tensor is cut: the tile, the groups or pieces of a slab, the chunks of the positions."""

    channels: int
    positions: int
    groups: int
    pieces: int
    slabs: int
    chunks: int
    tiles: int
    whole: bool

    @property
    def constants(self) -> dict[str, int]:
        kept = triton.next_power_of_2(self.groups)
        return {"CHANNELS": self.channels, "POSITIONS": self.positions, "GROUPS": self.groups, "KEPT": kept}

    def warps(self, element_size: int, results: int = 1) -> int:
        """float32 tiles, and two results, take more registers than four warps have."""
        return 8 if self.channels * self.positions * element_size * results > 2 * TILE else 4


def plan(channels: int, positions: int, groups: int, channels_last: bool) -> Plan:
    """Groups in a slab so that its channels fill the tile and, channels-last, begin at multiples of 16 bytes."""
    size = channels // groups
    row = triton.next_power_of_2(positions)
    if row * max(triton.next_power_of_2(size), 8) <= WHOLE_TILE and row <= TILE:
        tile_positions, tile_channels = row, max(TILE // row, triton.next_power_of_2(size))
    elif channels_last:
        tile_positions, tile_channels = TILE // WIDTH, WIDTH
    else:
        tile_positions, tile_channels = WIDTH, TILE // WIDTH
    pieces = triton.cdiv(size, tile_channels)
    together = min(max(tile_channels // size, 1), groups, MAX_GROUPS)
    step = next((step for step in (1, 2, 4, 8) if step * size % 8 == 0), 8)
    if channels_last and together > step:
        together -= together % step
    tile_channels = min(tile_channels, triton.next_power_of_2(together * size))
    tile_positions = min(row, max(tile_positions, TILE // tile_channels))
    slabs = groups * pieces if pieces > 1 else triton.cdiv(groups, together)
    tiles = triton.cdiv(positions, tile_positions)
    chunks = min(tiles, max(MAX_CHUNKS, min(tiles // 16, 4 * MAX_CHUNKS)))
    in_chunk = triton.cdiv(tiles, chunks)
    chunks = triton.cdiv(tiles, in_chunk)
    return Plan(tile_channels, tile_positions, together, pieces, slabs, chunks, in_chunk, tiles == pieces == 1)
