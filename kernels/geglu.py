"""a * gelu(b) with x = [a, b]; see `fastdiff.ops.geglu`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.aot import AotCase

BLOCK = 1024


@triton.jit
def geglu_kernel(
    x,  # (rows, 2 * hidden)
    y,  # (rows, hidden)
    total,  # rows * hidden
    hidden,
    BLOCK: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    row = begin // hidden
    # Elements from the beginning of the row in which the block begins: small numbers, which divide fast.
    element = (begin - row * hidden).to(tl.int32) + tl.arange(0, BLOCK)
    mask = tl.arange(0, BLOCK) < total - begin
    value = x + row * 2 * hidden + element + element // hidden * hidden
    a = tl.load(value, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(value + hidden, mask=mask, other=0.0).to(tl.float32)
    gated = a * (0.5 * b * (1.0 + tl.erf(b * 0.7071067811865476)))
    tl.store(y + row * hidden + element, gated.to(y.dtype.element_ty), mask=mask)


def run(x: Tensor) -> Tensor:
    """The registered operator's arguments; launches on the current stream of x's device."""
    x = x.contiguous()
    hidden = x.shape[-1] // 2
    y = x.new_empty((*x.shape[:-1], hidden))
    if y.numel():
        with torch.cuda.device_of(x):
            geglu_kernel[(triton.cdiv(y.numel(), BLOCK),)](x, y, y.numel(), hidden, BLOCK=BLOCK, num_warps=4)
    return y


def _case(dtype: str, total: str) -> AotCase:
    signature = {"x": f"*{dtype}", "y": f"*{dtype}", "total": total, "hidden": "i32", "BLOCK": "constexpr"}
    divisible = ("x", "y", "total", "hidden")
    return AotCase(f"{dtype} {total}", geglu_kernel, signature, {"BLOCK": BLOCK}, divisible=divisible)


AOT = [*(_case(dtype, "i32") for dtype in ("fp32", "fp16", "bf16")), _case("bf16", "i64")]
