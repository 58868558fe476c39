"""The step of Langevin dynamics from the norms of noise and score; see `fastdiff.ops.langevin_step_size`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.aot import AotCase
from fastdiff.kernels.layout import dense
from fastdiff.kernels.philox import normals
from fastdiff.kernels.prediction import cut, find_row, load_used, predict, sizes
from fastdiff.kernels.sampler_step import STREAM_STEP

BLOCK = 1024


@triton.jit(do_not_specialize=["row"])
def squares_kernel(
    x,  # (N, count)
    model_output,  # (G * N, output_count)
    table,  # (rows, 32) float32
    counter,  # (1,) int64, or None
    weights,  # (N, G) float32, or None
    noise,  # (N, count), or None
    seeds,  # (N,) int64, or None; None where noise is given
    partial,  # (2, N, chunks) float32: of the noise, of the score
    samples,
    count,
    output_count,
    inner,  # C where model_output is channels-last, else 1
    row,
    rows,
    chunks,
    tiles,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    at_row, index, valid = find_row(table, counter, row, rows)
    of_noise = tl.zeros((BLOCK,), tl.float32)
    of_score = tl.zeros((BLOCK,), tl.float32)
    for tile in range(0, tiles):
        begin = (chunk * tiles + tile) * BLOCK
        element = begin + tl.arange(0, BLOCK)
        d = predict(
            x, model_output, weights, at_row, valid, sample, element, samples, count, output_count, inner, GROUPS
        )
        if seeds is None:
            z = load_used(noise, sample * count + element, True, element, count)
        else:
            z = tl.where(element < count, normals(tl.load(seeds + sample), begin, index, STREAM_STEP, BLOCK), 0.0)
        of_noise += z * z
        of_score += d * d
    at = partial + tl.program_id(0)
    tl.store(at, tl.sum(of_noise))
    tl.store(at + tl.num_programs(0).to(tl.int64), tl.sum(of_score))


@triton.jit
def step_size_kernel(
    partial,  # (2, N, chunks) float32
    scales,  # (N, 3) float32
    chunks,
    factor,  # 2 snr^2
    PARTIALS: tl.constexpr,  # a power of two, at least chunks
):
    sample = tl.program_id(0).to(tl.int64)
    chunk = tl.arange(0, PARTIALS)
    at = partial + sample * chunks + chunk
    plane = tl.num_programs(0).to(tl.int64) * chunks
    of_noise = tl.sum(tl.load(at, mask=chunk < chunks, other=0.0).to(tl.float64))
    of_score = tl.sum(tl.load(at + plane, mask=chunk < chunks, other=0.0).to(tl.float64))
    nothing = of_score == 0.0
    e = tl.where(nothing, 0.0, factor * of_noise / tl.where(nothing, 1.0, of_score))
    tl.store(scales + 3 * sample, float("inf"))
    tl.store(scales + 3 * sample + 1, e.to(tl.float32))
    tl.store(scales + 3 * sample + 2, tl.sqrt(2.0 * e).to(tl.float32))


def run(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    counter: Tensor | None,
    weights: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    snr: float,
) -> Tensor:
    """The registered operator's arguments; launches on the current stream of x's device."""
    x, m = x.contiguous(), dense(model_output)
    samples, count, output_count, last = sizes(x, m)
    chunks, tiles, partials = cut(count, BLOCK)
    partial = x.new_empty((2, samples, chunks), dtype=torch.float32)
    scales = x.new_empty((samples, 3), dtype=torch.float32)
    with torch.cuda.device_of(x):
        squares_kernel[(samples * chunks,)](
            x,
            m,
            table,
            counter,
            weights,
            noise if noise is None else noise.contiguous(),
            seeds if noise is None else None,
            partial,
            samples,
            count,
            output_count,
            last,
            row,
            table.shape[0],
            chunks,
            tiles,
            GROUPS=len(m) // samples,
            BLOCK=BLOCK,
            num_warps=4,
        )
        step_size_kernel[(samples,)](partial, scales, chunks, 2.0 * snr * snr, PARTIALS=partials, num_warps=1)
    return scales


def _case(name: str, dtype: str, inner: int = 1, groups: int = 2, ones: tuple[str, ...] = (), **given: str) -> AotCase:
    """`ones`: integers that are 1, besides inner."""
    pointers = {"x": "fp32", "model_output": dtype, "table": "fp32", "partial": "fp32", **given}
    signature = {
        argument: f"*{pointers[argument]}" if argument in pointers else "constexpr"
        for argument in squares_kernel.arg_names
    }
    integers = ("samples", "count", "output_count", "inner", "row", "rows", "chunks", "tiles")
    signature |= dict.fromkeys(integers, "i32")
    constexprs = {name: None for name in ("counter", "weights", "noise", "seeds") if name not in pointers}
    constexprs |= {"GROUPS": groups, "BLOCK": BLOCK}
    for argument in (*ones, *(("inner",) if inner == 1 else ())):
        signature[argument], constexprs[argument] = "constexpr", 1
    return AotCase(
        name=name,
        kernel=squares_kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=(*pointers, "count", "output_count"),
        wide_loads=0.5 if inner == 1 else 0.0,
        wide_stores=0.0,  # it writes two numbers
    )


AOT = [
    *(_case(f"drawn {dtype}", dtype, seeds="i64", counter="i64") for dtype in ("fp32", "fp16", "bf16")),
    *(_case(f"given {dtype}", dtype, noise=dtype) for dtype in ("fp32", "fp16", "bf16")),
    _case("given, unguided", "bf16", groups=1, noise="fp32"),
    _case("drawn, weights", "bf16", groups=3, seeds="i64", weights="fp32"),
    _case("drawn, one small sample, one row", "bf16", ones=("samples", "rows", "chunks", "tiles"), seeds="i64"),
    _case("drawn, channels-last", "bf16", 4, seeds="i64"),
    AotCase(
        name="step size",
        kernel=step_size_kernel,
        signature={"partial": "*fp32", "scales": "*fp32", "chunks": "i32", "factor": "fp32", "PARTIALS": "constexpr"},
        constexprs={"PARTIALS": 64},
        num_warps=1,
        divisible=("partial", "scales", "chunks"),
        wide_loads=0.0,  # two loads of 64 numbers
        wide_stores=0.0,
    ),
]
