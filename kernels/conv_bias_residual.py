"""conv_bias_residual: a convolution of a channels-last map as one matrix product, with what is added to its result.

A program makes (BLOCK_M pixels of the result) x (BLOCK_N channels); it sums over the taps times C channels and reads x
where the tap lies, zeros beyond the edge. Neighbouring programs share their part of the weight, which for the wide
layers of a U-Net is many times the size of x.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.aot import AotCase
from fastdiff.kernels.conv_tile import convolve_tile
from fastdiff.kernels.layout import memory_format


@triton.jit
def conv_bias_residual_kernel(
    x,  # (N, height, width, channels)
    weight,  # (outputs, TAPS_H, TAPS_W, channels)
    bias,  # (outputs,) or None
    residual,  # as out, or None
    out,  # (N, outputs, out_height, out_width) in the strides below
    pixels,  # N * out_height * out_width
    height,
    width,
    channels,
    out_height,
    out_width,
    outputs,
    step_h, step_w,  # from one pixel's taps to the next one's
    pad_h, pad_w,
    stride_n, stride_c, stride_h, stride_w,
    TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    blocks_m = tl.cdiv(pixels, BLOCK_M)
    pixel = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    output = tl.program_id(0) // blocks_m * BLOCK_N + tl.arange(0, BLOCK_N)
    column = pixel % out_width
    row = pixel // out_width % out_height
    sample = (pixel // out_width // out_height).to(tl.int64)
    weights = weight + output.to(tl.int64) * (TAPS_H * TAPS_W) * channels
    is_pixel, is_output = pixel < pixels, output < outputs
    total = convolve_tile(
        x, weights, bias, sample, row * step_h - pad_h, column * step_w - pad_w, output, is_pixel, is_output,
        height, width, channels, TAPS_H, TAPS_W, BIAS, BLOCK_M, BLOCK_N, BLOCK_K, WIDE,
    )  # fmt: skip

    starts = sample * stride_n + row.to(tl.int64) * stride_h + column.to(tl.int64) * stride_w
    offsets = starts[:, None] + (output.to(tl.int64) * stride_c)[None, :]
    inside = is_pixel[:, None] & is_output[None, :]
    if RESIDUAL:
        total += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + offsets, total, mask=inside)


PROGRAMS = 128
"""Of large blocks; with fewer, much of the GPU stands idle, and small blocks reach more of it."""


def blocks(dtype: torch.dtype, pixels: int, outputs: int) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps, stages: none spills registers on sm_80, 90 and 100.

    Not yet measured on a GPU.
    """
    if dtype == torch.float32:
        return 64, 64, 16, 8, 2
    if triton.cdiv(pixels, 128) * triton.cdiv(outputs, 128) < PROGRAMS:
        return 64, 64, 64, 4, 3
    return 128, 128, 64, 8, 3


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, stride: list[int], padding: list[int]
) -> Tensor:
    n, channels, height, width = x.shape
    outputs, _, *taps = weight.shape
    out_height, out_width = ((x.shape[2 + d] + 2 * padding[d] - taps[d]) // stride[d] + 1 for d in range(2))
    layout, pixels = memory_format(x), n * out_height * out_width
    out = torch.empty((n, outputs, out_height, out_width), dtype=x.dtype, device=x.device, memory_format=layout)
    if pixels == 0:
        return out
    x, weight = (value.contiguous(memory_format=torch.channels_last) for value in (x, weight))
    if residual is not None:
        residual = residual.contiguous(memory_format=layout)
    block_m, block_n, block_k, warps, stages = blocks(x.dtype, pixels, outputs)
    conv_bias_residual_kernel[(triton.cdiv(pixels, block_m) * triton.cdiv(outputs, block_n),)](
        x, weight, bias, residual, out, pixels, height, width, channels, out_height, out_width, outputs,
        *stride, *padding, *out.stride(), TAPS_H=taps[0], TAPS_W=taps[1], BIAS=bias is not None,
        RESIDUAL=residual is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
        WIDE=x.device.type == "cpu", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _case(
    dtype: torch.dtype, channels: int, size: int, *, taps: int = 3, step: int = 1, channels_last: bool = True,
    bias: bool = True, residual: bool = True,
) -> AotCase:  # fmt: skip
    """What `run` launches for two maps of `size` x `size` and as many channels out as in."""
    kind = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    block_m, block_n, block_k, warps, stages = blocks(dtype, 2 * size**2, channels)
    names = conv_bias_residual_kernel.arg_names
    integers = names[names.index("pixels") : names.index("TAPS_H")]
    constexprs: dict[str, Any] = {
        "TAPS_H": taps, "TAPS_W": taps, "BIAS": bias, "RESIDUAL": residual,
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "WIDE": False,
        "stride_c" if channels_last else "stride_w": 1,
    }  # fmt: skip
    if step == 1:
        constexprs |= {"step_h": 1, "step_w": 1}
    if taps == 3:
        constexprs |= {"pad_h": 1, "pad_w": 1}
    for name, given in (("bias", bias), ("residual", residual)):
        if not given:
            constexprs[name] = None
    types = dict.fromkeys(("x", "weight", "bias", "residual", "out"), "*" + kind) | dict.fromkeys(integers, "i32")
    options = (f"{taps}x{taps}", f"stride {step}" * (step > 1), "NCHW" * (not channels_last))
    return AotCase(
        " ".join(filter(None, (kind, f"{channels} at {size}", *options, "bias" * bias, "residual" * residual))),
        conv_bias_residual_kernel,
        {name: "constexpr" if name in constexprs else types[name] for name in names},
        constexprs,
        num_warps=warps,
        num_stages=stages,
        matrix=dtype != torch.float32,
        divisible=tuple(name for name in names if name not in constexprs and not name.startswith(("step", "pad"))),
    )


AOT = [
    *(
        _case(torch.bfloat16, 320, 64, bias=given, residual=given, channels_last=layout)
        for layout in (True, False)
        for given in (True, False)
    ),
    _case(torch.bfloat16, 1280, 16),
    _case(torch.bfloat16, 320, 64, step=2),
    _case(torch.bfloat16, 640, 32, taps=1),
    _case(torch.float16, 1280, 32),
    _case(torch.float32, 320, 64),
]
