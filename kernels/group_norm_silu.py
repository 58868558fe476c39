"""silu(group_norm(x + addend + residual) * weight + bias), x being one tensor or two side by side.

See `fastdiff.ops.group_norm_silu`.

`moments_kernel` takes mean and centred squares of each group over a chunk of the positions, one writer per slot;
`apply_kernel` merges the chunks (Chan, Golub and LeVeque, 1979) and walks them backwards, so that what was read last is
still in the cache. Where the positions fit one tile, `whole_kernel` does both in one reading.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.group_norm_aot import case
from fastdiff.kernels.group_norm_plan import plan
from fastdiff.kernels.group_norm_tile import (
    channel_values,
    group_moments,
    load_tile,
    places,
    reference_of,
    slab_channels,
    store_result,
    tile_moments,
    to_channels,
)
from fastdiff.kernels.layout import dense, memory_format


@triton.jit
def moments_kernel(
    x,  # (N, C, S), or (N, x_channels, S); channel c and position s at c * channel_stride + s * position_stride
    addend,  # (N, C), or None
    residual,  # as x, or None
    second,  # more channels, or None
    partial,  # (3, N * groups, chunks * PIECES) float32: reference, mean less reference, squares
    channels,
    positions,
    channel_stride,
    position_stride,
    x_channels,  # where there is a second input, or None; so are the strides
    x_stride,
    second_stride,
    groups,
    slabs,
    chunks,
    tiles,  # of a chunk
    CHANNELS: tl.constexpr,  # of a tile
    POSITIONS: tl.constexpr,
    SIZE: tl.constexpr,  # channels of a group
    GROUPS: tl.constexpr,  # of a slab
    KEPT: tl.constexpr,  # the power of 2 that holds GROUPS
    PIECES: tl.constexpr,  # slabs of a group larger than a tile, else 1
):
    chunk = tl.program_id(0) % chunks
    slab = tl.program_id(0) // chunks % slabs
    sample = (tl.program_id(0) // chunks // slabs).to(tl.int64)
    channel, mask, member, group, size = slab_channels(slab, channels, CHANNELS, SIZE, GROUPS, KEPT, PIECES)
    added = channel_values(addend, sample * channels + channel, mask, 0.0)
    place = places(
        channel, mask, sample, channels, positions, channel_stride, position_stride, x_channels, x_stride, second_stride
    )

    begin = chunk * tiles * POSITIONS
    h, _, inside = load_tile(x, residual, second, added, place, begin, positions, POSITIONS)
    count = tl.minimum(positions - begin, POSITIONS)
    reference = reference_of(h, inside, member, count, size)
    center = to_channels(reference, member)
    mean, squares = tile_moments(h, inside, center, count.to(tl.float32))
    seen = count.to(tl.float32)
    for tile in range(1, tiles):
        begin = (chunk * tiles + tile) * POSITIONS
        h, _, inside = load_tile(x, residual, second, added, place, begin, positions, POSITIONS)
        more = tl.maximum(tl.minimum(positions - begin, POSITIONS), 0).to(tl.float32)
        tile_mean, tile_squares = tile_moments(h, inside, center, tl.maximum(more, 1.0))
        apart = tile_mean - mean
        weight = more / (seen + more)
        mean += apart * weight
        squares += tile_squares + apart * apart * (seen * weight)
        seen += more

    mean, squares = group_moments(mean, squares, seen, size, member)
    kept = tl.arange(0, KEPT)
    exists = (kept < GROUPS) & (group + kept < groups)
    row = (sample * groups + group + kept) * (chunks * PIECES) + chunk * PIECES + slab % PIECES
    plane = tl.num_programs(0).to(tl.int64) // slabs // chunks * groups * (chunks * PIECES)
    tl.store(partial + row, reference, mask=exists)
    tl.store(partial + plane + row, mean, mask=exists)
    tl.store(partial + 2 * plane + row, squares, mask=exists)


@triton.jit
def apply_kernel(
    x,  # (N, C, S), as in moments_kernel
    weight,  # (C,), or None; so is bias
    bias,
    addend,  # (N, C), or None
    residual,  # as x, or None
    second,  # more channels, or None
    partial,  # as in moments_kernel
    y,  # as x
    total,  # as x, or None
    channels,
    positions,
    channel_stride,
    position_stride,
    x_channels,  # where there is a second input, or None; so are the strides
    x_stride,
    second_stride,
    groups,
    slabs,
    chunks,
    tiles,
    eps,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    PIECES: tl.constexpr,
    PARTIALS: tl.constexpr,  # the power of 2 that holds chunks * PIECES
):
    last = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk = last % chunks
    slab = last // chunks % slabs
    sample = (last // chunks // slabs).to(tl.int64)
    channel, mask, member, group, _ = slab_channels(slab, channels, CHANNELS, SIZE, GROUPS, KEPT, PIECES)

    kept = tl.arange(0, KEPT)
    exists = (kept < GROUPS) & (group + kept < groups)
    row = (sample * groups + group + kept) * (chunks * PIECES)
    plane = tl.num_programs(0).to(tl.int64) // slabs // chunks * groups * (chunks * PIECES)
    part = tl.arange(0, PARTIALS)
    taken = exists[:, None] & (part < chunks * PIECES)[None, :]
    at_part = partial + row[:, None] + part[None, :]
    begins = part // PIECES * tiles * POSITIONS
    sizes = tl.minimum(SIZE - part % PIECES * CHANNELS, CHANNELS) if PIECES > 1 else SIZE
    counts = tl.where(part < chunks * PIECES, tl.minimum(positions - begins, tiles * POSITIONS) * sizes, 0)
    n = counts.to(tl.float32)[None, :]
    all_n = positions.to(tl.float32) * SIZE
    reference = tl.load(partial + row, mask=exists, other=0.0)
    distance = tl.load(at_part, mask=taken, other=0.0) - reference[:, None]
    distance = tl.where(taken, distance + tl.load(at_part + plane, mask=taken, other=0.0), 0.0)
    mean = tl.sum(distance * n, axis=1) / all_n
    apart = distance - mean[:, None]
    squares = tl.load(at_part + 2 * plane, mask=taken, other=0.0) + n * apart * apart
    inverse = tl.rsqrt(tl.sum(tl.where(taken, squares, 0.0), axis=1) / all_n + eps)

    center = to_channels(reference, member)
    mean_of_channel = to_channels(mean, member)
    scale = to_channels(inverse, member) * channel_values(weight, channel, mask, 1.0)
    shift = channel_values(bias, channel, mask, 0.0)
    added = channel_values(addend, sample * channels + channel, mask, 0.0)
    place = places(
        channel, mask, sample, channels, positions, channel_stride, position_stride, x_channels, x_stride, second_stride
    )
    for tile in range(0, tiles):
        begin = (chunk * tiles + tiles - 1 - tile) * POSITIONS
        h, at, inside = load_tile(x, residual, second, added, place, begin, positions, POSITIONS)
        store_result(y, total, h, center, mean_of_channel, scale, shift, at, inside, SILU)


@triton.jit
def whole_kernel(
    x,  # (N, C, S), as in moments_kernel
    weight,  # (C,), or None; so is bias
    bias,
    addend,  # (N, C), or None
    residual,  # as x, or None
    second,  # more channels, or None
    y,  # as x
    total,  # as x, or None
    channels,
    positions,
    channel_stride,
    position_stride,
    x_channels,
    x_stride,
    second_stride,
    slabs,
    eps,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    POSITIONS: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
):
    slab = tl.program_id(0) % slabs
    sample = (tl.program_id(0) // slabs).to(tl.int64)
    channel, mask, member, _, _ = slab_channels(slab, channels, CHANNELS, SIZE, GROUPS, KEPT, 1)
    added = channel_values(addend, sample * channels + channel, mask, 0.0)
    place = places(
        channel, mask, sample, channels, positions, channel_stride, position_stride, x_channels, x_stride, second_stride
    )
    h, at, inside = load_tile(x, residual, second, added, place, 0, positions, POSITIONS)

    count = positions.to(tl.float32)
    center = to_channels(reference_of(h, inside, member, positions, SIZE), member)
    mean, squares = tile_moments(h, inside, center, count)
    mean, squares = group_moments(mean, squares, count, SIZE, member)
    inverse = tl.rsqrt(squares / (count * SIZE) + eps)
    scale = to_channels(inverse, member) * channel_values(weight, channel, mask, 1.0)
    shift = channel_values(bias, channel, mask, 0.0)
    store_result(y, total, h, center, to_channels(mean, member), scale, shift, at, inside, SILU)


def run(
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    silu: bool,
    addend: Tensor | None,
    residual: Tensor | None,
    second: Tensor | None,
    return_sum: bool,
) -> tuple[Tensor, Tensor]:
    """The registered operator's arguments; launches on the current stream of x's device."""
    x = dense(x)
    layout = memory_format(x, second)
    samples, channels = x.shape[:2]
    positions = x.numel() // (samples * channels)
    # A contiguous sample of one position is a channels-last one.
    channels_last = layout != torch.contiguous_format or positions == 1
    joint = (None, None, None)
    if second is not None:
        second = second.contiguous(memory_format=layout)
        joint = (channels, channels, second.shape[1]) if channels_last else (channels, 1, 1)
        channels += second.shape[1]
    y = torch.empty((samples, channels, *x.shape[2:]), dtype=x.dtype, device=x.device, memory_format=layout)
    total = torch.empty_like(y) if return_sum else None
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    weight, bias, addend = (None if value is None else value.contiguous() for value in (weight, bias, addend))
    strides = (1, channels) if channels_last else (positions, 1)
    cut = plan(channels, positions, groups, channels_last)
    size = channels // groups
    results = 1 if total is None else 2
    with torch.cuda.device_of(x):
        sizes = (channels, positions, *strides, *joint)
        if cut.whole:
            whole_kernel[(samples * cut.slabs,)](
                x, weight, bias, addend, residual, second, y, total, *sizes, cut.slabs, eps,
                SILU=silu, SIZE=size, num_warps=cut.warps(x.element_size(), results), **cut.constants,
            )  # fmt: skip
        else:
            parts = cut.chunks * cut.pieces
            partial = x.new_empty((3, samples * groups, parts), dtype=torch.float32)
            grid = (samples * cut.slabs * cut.chunks,)
            cuts = (groups, cut.slabs, cut.chunks, cut.tiles)
            constants = {"SIZE": size, "PIECES": cut.pieces, **cut.constants}
            moments_kernel[grid](
                x, addend, residual, second, partial, *sizes, *cuts, num_warps=cut.warps(x.element_size()), **constants
            )
            apply_kernel[grid](
                x, weight, bias, addend, residual, second, partial, y, total, *sizes, *cuts, eps,
                SILU=silu, PARTIALS=triton.next_power_of_2(parts), num_warps=cut.warps(x.element_size(), results),
                **constants,
            )  # fmt: skip
    return y, x.new_empty(0) if total is None else total


_DTYPES = ("fp32", "fp16", "bf16")
_SPLIT = (moments_kernel, apply_kernel)
_LAYOUTS = ("contiguous", "channels-last")
_ALL = ("addend", "residual", "total")
_SUM = ("addend", "total")
_TWO = ("fp32", "bf16")
AOT = [
    *(case(kernel, dtype, (320, 4096, 32), layout) for kernel in _SPLIT for dtype in _DTYPES for layout in _LAYOUTS),
    *(case(kernel, "bf16", (320, 4096, 32), layout, *_ALL) for kernel in _SPLIT for layout in _LAYOUTS),
    *(case(kernel, "fp32", (320, 4096, 32), layout, *_ALL) for kernel in _SPLIT for layout in _LAYOUTS),
    *(case(kernel, "bf16", (512, 4096, 1), layout) for kernel in _SPLIT for layout in _LAYOUTS),
    *(case(whole_kernel, dtype, (1280, 64, 32), layout, *_ALL) for dtype in _DTYPES for layout in _LAYOUTS),
    *(
        case(kernel, dtype, (960, 4096, 32, 640), layout, *_SUM)
        for kernel in _SPLIT
        for dtype in _TWO
        for layout in _LAYOUTS
    ),
    *(case(whole_kernel, dtype, (2560, 64, 32, 1280), layout, *_SUM) for dtype in _TWO for layout in _LAYOUTS),
]
