"""Triton kernels that the gate of test_triton_compiles.py must refuse, each for the reason in its name."""

from __future__ import annotations

import triton
import triton.language as tl

from fastdiff.kernels.aot import AotCase


@triton.jit
def spilling_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    values = tl.load(x + i)
    tl.store(y + i, values * tl.sum(values, 0))


@triton.jit
def scalar_kernel(x, y, stride, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i * stride, tl.load(x + i * stride) + 1.0)


@triton.jit
def product_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tile = i[:, None] * BLOCK + i[None, :]
    a = tl.load(x + tile)
    tl.store(y + tile, tl.dot(a, a, input_precision="ieee"))


_FLOATS = {"x": "*fp32", "y": "*fp32"}
AOT = [
    AotCase(
        "spilling",
        spilling_kernel,
        {**_FLOATS, "BLOCK": "constexpr"},
        {"BLOCK": 16384},
        num_warps=1,
        divisible=("x", "y"),
    ),
    AotCase(
        "scalar",
        scalar_kernel,
        {**_FLOATS, "stride": "i32", "BLOCK": "constexpr"},
        {"BLOCK": 1024},
        divisible=("x", "y"),
    ),
    AotCase(
        "product without tensor cores",
        product_kernel,
        {**_FLOATS, "BLOCK": "constexpr"},
        {"BLOCK": 32},
        matrix=True,
        divisible=("x", "y"),
    ),
]
