"""upsample_conv: four 2x2 convolutions of a channels-last map, one for each pixel of a 2x2 block, as matrix products.

A program makes (BLOCK_M positions of x) x (BLOCK_N channels) of one phase; it sums over 4 taps times C channels and
reads x where the tap lies, zeros beyond the edge. Neighbouring programs share their part of the weight, which for the
wide layers of a U-Net is many times the size of x.
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
def upsample_conv_kernel(
    x,  # (N, height, width, channels)
    weight,  # (2, 2, outputs, 2, 2, channels): phase, output, tap, channel
    bias,  # (outputs,) or None
    out,  # (N, outputs, 2 height, 2 width) in the strides below
    positions,  # N * height * width
    height,
    width,
    channels,
    outputs,
    stride_n, stride_c, stride_h, stride_w,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    blocks_m, blocks_n = tl.cdiv(positions, BLOCK_M), tl.cdiv(outputs, BLOCK_N)
    block = tl.program_id(0) // blocks_m
    a, b = block // blocks_n // 2, block // blocks_n % 2
    position = tl.program_id(0) % blocks_m * BLOCK_M + tl.arange(0, BLOCK_M)
    output = block % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    column = position % width
    row = position // width % height
    sample = (position // width // height).to(tl.int64)
    weights = weight + ((2 * a + b) * outputs + output).to(tl.int64) * 4 * channels
    is_position, is_output = position < positions, output < outputs
    total = convolve_tile(
        x, weights, bias, sample, row + a - 1, column + b - 1, output, is_position, is_output,
        height, width, channels, 2, 2, BIAS, BLOCK_M, BLOCK_N, BLOCK_K, WIDE,
    )  # fmt: skip

    pixels = out + sample * stride_n + (2 * row + a) * stride_h + (2 * column + b) * stride_w
    pointers = pixels[:, None] + (output * stride_c)[None, :]
    tl.store(pointers, total, mask=is_position[:, None] & is_output[None, :])


def blocks(dtype: torch.dtype) -> tuple[int, int, int, int, int]:
    """BLOCK_M, BLOCK_N, BLOCK_K, warps, stages: none spills registers on sm_80, 90 and 100.

    Not yet measured on a GPU.
    """
    return (64, 64, 16, 8, 2) if dtype == torch.float32 else (128, 128, 64, 8, 3)


def run(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    n, channels, height, width = x.shape
    outputs, layout = weight.shape[0] // 4, torch.channels_last
    shape = (n, outputs, 2 * height, 2 * width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    if out.numel() == 0:
        return out
    x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
    block_m, block_n, block_k, warps, stages = blocks(x.dtype)
    positions = n * height * width
    upsample_conv_kernel[(4 * triton.cdiv(positions, block_m) * triton.cdiv(outputs, block_n),)](
        x, weight, bias, out, positions, height, width, channels, outputs, *out.stride(), BIAS=bias is not None,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, WIDE=x.device.type == "cpu",
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _case(dtype: torch.dtype, channels: int, *, channels_last: bool, bias: bool) -> AotCase:
    """What `run` launches for maps of 64x64 and as many channels out as in."""
    kind = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    block_m, block_n, block_k, warps, stages = blocks(dtype)
    names = upsample_conv_kernel.arg_names
    integers = names[names.index("positions") : names.index("BIAS")]
    constexprs: dict[str, Any] = {
        "BIAS": bias, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "WIDE": False,
        "stride_c" if channels_last else "stride_w": 1,
    }  # fmt: skip
    if not bias:
        constexprs["bias"] = None
    types = dict.fromkeys(("x", "weight", "bias", "out"), "*" + kind) | dict.fromkeys(integers, "i32")
    return AotCase(
        f"{kind} {channels} {'channels-last' if channels_last else 'contiguous'}" + " bias" * bias,
        upsample_conv_kernel,
        {name: "constexpr" if name in constexprs else types[name] for name in names},
        constexprs,
        num_warps=warps,
        num_stages=stages,
        matrix=dtype != torch.float32,
        wide_stores=0.5 if channels_last else 0.0,  # a contiguous map has the pixels of another phase in between
        divisible=tuple(name for name in names if name not in constexprs),
    )


AOT = [
    *(
        _case(torch.bfloat16, 512, channels_last=layout, bias=bias)
        for layout in (True, False)
        for bias in (True, False)
    ),
    _case(torch.float16, 1280, channels_last=True, bias=True),
    _case(torch.float32, 320, channels_last=True, bias=True),
]
