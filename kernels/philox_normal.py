"""Standard normals of which sample n depends on seeds[n] only; see `fastdiff.ops.philox_normal`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.aot import AotCase
from fastdiff.kernels.philox import normals

BLOCK = 1024


@triton.jit(do_not_specialize=["step", "stream"])
def philox_normal_kernel(
    seeds,  # (N,) int64
    out,  # (N, count)
    count,
    step,
    stream,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(count, BLOCK)
    sample = tl.program_id(0) // blocks
    begin = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    values = normals(tl.load(seeds + sample), begin, step, stream, BLOCK)
    element = begin + tl.arange(0, BLOCK)
    tl.store(out + sample.to(tl.int64) * count + element, values.to(out.dtype.element_ty), mask=element < count)


def run(seeds: Tensor, shape: Sequence[int], step: int, stream: int, dtype: torch.dtype) -> Tensor:
    """The registered operator's arguments; launches on the current stream of seeds' device."""
    out = torch.empty(tuple(shape), dtype=dtype, device=seeds.device)
    if out.numel() == 0:
        return out
    count = out.numel() // out.shape[0]
    with torch.cuda.device_of(seeds):
        grid = (out.shape[0] * triton.cdiv(count, BLOCK),)
        philox_normal_kernel[grid](seeds, out, count, step, stream, BLOCK=BLOCK, num_warps=4)
    return out


AOT = [
    AotCase(
        name=dtype,
        kernel=philox_normal_kernel,
        signature={
            "seeds": "*i64",
            "out": f"*{dtype}",
            "count": "i32",
            "step": "i64",
            "stream": "i32",
            "BLOCK": "constexpr",
        },
        constexprs={"BLOCK": BLOCK},
        divisible=("seeds", "out", "count"),
        wide_loads=0.0,  # it reads a seed
    )
    for dtype in ("fp32", "fp16", "bf16")
]
