"""The tile of a convolution as one matrix product: what its kernels share, which differ in where the taps lie."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def convolve_tile(
    x,  # (N, height, width, channels)
    weights,  # [BLOCK_N] pointers to (TAPS_H, TAPS_W, channels), one for each output
    bias,  # (outputs,) or None
    sample, top, left,  # [BLOCK_M] the pixel of x under the first tap; sample is int64
    output,  # [BLOCK_N]
    is_pixel,  # [BLOCK_M]
    is_output,  # [BLOCK_N]
    height,
    width,
    channels,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,  # for Triton's interpreter, which multiplies bfloat16 as the integers of its bits
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] float32: the sum over the taps times the channels, x being zero beyond its edge, and bias."""
    x_rows = x + ((sample * height + top) * width + left) * channels
    channel = tl.arange(0, BLOCK_K)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    steps = tl.cdiv(channels, BLOCK_K)
    for step in range(TAPS_H * TAPS_W * steps):
        tap = step // steps
        down, right = tap // TAPS_W, tap % TAPS_W
        there = is_pixel & (top + down >= 0) & (top + down < height)
        there = there & (left + right >= 0) & (left + right < width)
        first = (step % steps) * BLOCK_K
        in_k = channel < channels - first
        x_tile = tl.load(
            x_rows[:, None] + ((down * width + right) * channels + first) + channel[None, :],
            mask=there[:, None] & in_k[None, :], other=0.0,
        )  # fmt: skip
        w_tile = tl.load(
            weights[:, None] + (tap * channels + first) + channel[None, :],
            mask=is_output[:, None] & in_k[None, :], other=0.0,
        )  # fmt: skip
        if WIDE:
            x_tile, w_tile = x_tile.to(tl.float32), w_tile.to(tl.float32)
        total = tl.dot(x_tile, tl.trans(w_tile), total, input_precision="ieee")
    if BIAS:
        total += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    return total
