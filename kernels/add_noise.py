"""alpha[n] * x[n] + sigma[n] * noise[n], the noise given or drawn; see `fastdiff.ops.add_noise`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.aot import AotCase
from fastdiff.kernels.layout import dense, inner, memory_format
from fastdiff.kernels.philox import normals

BLOCK = 1024


@triton.jit(do_not_specialize=["step", "stream"])
def add_noise_kernel(
    x,  # (N, count), in any dense order
    noise,  # as x, or None
    alpha,  # (N,) float32
    sigma,  # (N,) float32
    seeds,  # (N,) int64, or None
    out,  # as x
    count,
    inner,  # C where x is channels-last and the noise is drawn, else 1
    step,
    stream,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(count, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    begin = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    element = begin + tl.arange(0, BLOCK)
    mask = element < count
    if inner == 1:
        offset = sample * count + element
    else:
        spatial = count // inner
        offset = sample * count + element % spatial * inner + element // spatial
    if seeds is None:
        z = tl.load(noise + offset, mask=mask, other=0.0).to(tl.float32)
    else:
        z = normals(tl.load(seeds + sample), begin, step, stream, BLOCK)
    state = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    noised = tl.load(alpha + sample) * state + tl.load(sigma + sample) * z
    tl.store(out + offset, noised.to(out.dtype.element_ty), mask=mask)


def run(
    x: Tensor, alpha: Tensor, sigma: Tensor, noise: Tensor | None, seeds: Tensor | None, step: int, stream: int
) -> Tensor:
    """The registered operator's arguments; launches on the current stream of x's device."""
    x = dense(x)
    out = torch.empty_like(x, memory_format=memory_format(x))
    if out.numel() == 0:
        return out
    if noise is not None:
        noise = noise.contiguous(memory_format=memory_format(x))
    count = x.numel() // x.shape[0]
    stride = 1 if seeds is None else inner(x)
    with torch.cuda.device_of(x):
        grid = (x.shape[0] * triton.cdiv(count, BLOCK),)
        add_noise_kernel[grid](
            x, noise, alpha, sigma, seeds, out, count, stride, step, stream, BLOCK=BLOCK, num_warps=4
        )
    return out


def _case(name: str, dtype: str, given: bool, inner: int = 1) -> AotCase:
    pointers = {"x": dtype, "noise": dtype, "alpha": "fp32", "sigma": "fp32", "seeds": "i64", "out": dtype}
    absent = "seeds" if given else "noise"
    signature = {argument: "constexpr" if argument == absent else f"*{type}" for argument, type in pointers.items()}
    constexprs = {absent: None, "BLOCK": BLOCK}
    signature |= {"count": "i32", "inner": "i32", "step": "i64", "stream": "i32", "BLOCK": "constexpr"}
    if inner == 1:
        signature["inner"], constexprs["inner"] = "constexpr", 1
    return AotCase(
        name=name,
        kernel=add_noise_kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=(*(set(pointers) - {absent}), "count"),
        wide_loads=0.5 if inner == 1 else 0.0,
        wide_stores=0.5 if inner == 1 else 0.0,
    )


AOT = [
    *(_case(f"{dtype} given", dtype, True) for dtype in ("fp32", "fp16", "bf16")),
    *(_case(f"{dtype} drawn", dtype, False) for dtype in ("fp32", "bf16")),
    _case("fp32 drawn channels-last", "fp32", False, 4),
]
