"""Tiles of group_norm_silu: channels x positions of one sample, in either memory order, and their groups.

A slab is the whole groups that fit a tile's channels, or a piece of one group that is larger. Values are held as
distances to a reference near the group's mean, so that a large mean costs no digits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def slab_channels(
    slab,
    channels,
    CHANNELS: tl.constexpr,  # of a tile
    SIZE: tl.constexpr,  # channels of a group
    GROUPS: tl.constexpr,  # of a slab
    KEPT: tl.constexpr,
    PIECES: tl.constexpr,
):
    """(the tile's channels, which exist and are the slab's, [channels, groups]: whether the channel belongs to the
    group, first group, channels of its groups)."""
    offset = tl.arange(0, CHANNELS)
    if PIECES == 1:
        first, first_group, size = slab * (GROUPS * SIZE), slab * GROUPS, SIZE
        mask, group = offset < GROUPS * SIZE, offset // SIZE
    else:
        begin = slab % PIECES * CHANNELS
        first, first_group, size = slab // PIECES * SIZE + begin, slab // PIECES, tl.minimum(SIZE - begin, CHANNELS)
        mask, group = begin + offset < SIZE, offset * 0
    channel = first + offset
    mask &= channel < channels
    return channel, mask, (group[:, None] == tl.arange(0, KEPT)[None, :]) & mask[:, None], first_group, size


@triton.jit
def over_channels(values, member):
    """[channels] -> [groups]: sums."""
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@triton.jit
def to_channels(values, member):
    """[groups] -> [channels]: each channel's own."""
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@triton.jit
def channel_values(pointer, at, mask, MISSING: tl.constexpr):
    """A parameter of the channels as float32."""
    if pointer is None:
        return tl.where(mask, MISSING, 0.0)
    else:
        return tl.load(pointer + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def places(
    channel,
    mask,
    sample,
    channels,
    positions,
    channel_stride,
    position_stride,
    x_channels,  # the rest are those of a second input; None without one
    x_stride,  # from position to position, as second_stride
    second_stride,
):
    """(offsets of the channels, which are there, from position to position) in y, in x and in the second input."""
    c = channel.to(tl.int64)
    in_y = (sample * channels * positions + c * channel_stride, mask, position_stride)
    if x_channels is None:
        return in_y, in_y, in_y
    else:
        of_x, second_channels = channel < x_channels, channels - x_channels
        in_x = (sample * x_channels * positions + c * channel_stride, mask & of_x, x_stride)
        in_second = sample * second_channels * positions + (c - x_channels) * channel_stride
        return in_y, in_x, (in_second, mask & (of_x == 0), second_stride)


@triton.jit
def tile_at(place, begin, positions, POSITIONS: tl.constexpr):
    """(offsets, which exist) of the positions from `begin` on, [channels, positions]."""
    at_channel, mask, stride = place
    position = begin + tl.arange(0, POSITIONS)
    return at_channel[:, None] + position.to(tl.int64)[None, :] * stride, mask[:, None] & (position < positions)[
        None, :
    ]


@triton.jit
def load_tile(x, residual, second, addend, place, begin, positions, POSITIONS: tl.constexpr):
    """(h, offsets in y, which exist) of the positions from `begin` on, [channels, positions]; h is float32."""
    at, inside = tile_at(place[0], begin, positions, POSITIONS)
    at_x, in_x = tile_at(place[1], begin, positions, POSITIONS)
    h = tl.load(x + at_x, mask=in_x, other=0.0).to(tl.float32) + addend[:, None]
    if residual is not None:
        h += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    if second is not None:
        at_second, in_second = tile_at(place[2], begin, positions, POSITIONS)
        h += tl.load(second + at_second, mask=in_second, other=0.0).to(tl.float32)
    return h, at, inside


@triton.jit
def reference_of(h, mask, member, positions, size):
    """[groups]: the mean over a tile, up to rounding."""
    return over_channels(tl.sum(tl.where(mask, h, 0.0), axis=1), member) / (positions * size).to(tl.float32)


@triton.jit
def tile_moments(h, mask, reference, positions):
    """[channels]: mean distance to the reference, and the squared distances to that mean."""
    distance = tl.where(mask, h - reference[:, None], 0.0)
    mean = tl.sum(distance, axis=1) / positions
    centred = tl.where(mask, distance - mean[:, None], 0.0)
    return mean, tl.sum(centred * centred, axis=1)


@triton.jit
def group_moments(mean, squares, positions, size, member):
    """[groups]: those of channels that have the same count of positions."""
    group_mean = over_channels(mean, member) / size
    apart = mean - to_channels(group_mean, member)
    return group_mean, over_channels(squares + positions * apart * apart, member)


@triton.jit
def store_result(y, total, h, center, mean, scale, shift, at, mask, SILU: tl.constexpr):
    """y = act((h - center - mean) * scale + shift), and h itself where it is asked for."""
    z = (h - center[:, None] - mean[:, None]) * scale[:, None] + shift[:, None]
    if SILU:
        z = z / (1.0 + tl.exp(-z))
    tl.store(y + at, z.to(y.dtype.element_ty), mask=mask)
    if total is not None:
        tl.store(total + at, h.to(total.dtype.element_ty), mask=mask)
