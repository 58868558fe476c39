"""Dynamic thresholding's s by radix selection over the bits of |D|; see `fastdiff.ops.dynamic_threshold`.

Bits of floats that are not negative order like the floats. |D| is written once, by as many programs as there are
tiles; then one program takes a sample, and each of its passes counts the next digit of those values that share the
digits found so far.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.aot import AotCase
from fastdiff.kernels.layout import dense
from fastdiff.kernels.prediction import find_row, predict, sizes
from fastdiff.kernels.sampler_step import CLIP, coefficient

BLOCK = 1024
SELECT_BLOCK, SELECT_WARPS = 4096, 16
BINS = tl.constexpr(256)
INFINITE = tl.constexpr(0x7F800000)
NONE = tl.constexpr(0x7FFFFFFF)


@triton.jit(do_not_specialize=["row"])
def magnitudes_kernel(
    x,  # (N, count)
    model_output,  # (G * N, output_count)
    table,  # (rows, 32) float32
    counter,  # (1,) int64, or None
    weights,  # (N, G) float32, or None
    magnitudes,  # (N, count) float32: |D|, so that its bits are not negative
    samples,
    count,
    output_count,
    inner,  # C where model_output is channels-last, else 1
    row,
    rows,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(count, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    element = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at_row, _, valid = find_row(table, counter, row, rows)
    d = predict(x, model_output, weights, at_row, valid, sample, element, samples, count, output_count, inner, GROUPS)
    tl.store(magnitudes + sample * count + element, tl.abs(d), mask=element < count)


@triton.jit
def load_bits(at_sample, tile, count, BLOCK: tl.constexpr):
    """(the bits of a tile, which exist)."""
    element = tile * BLOCK + tl.arange(0, BLOCK)
    inside = element < count
    return tl.load(at_sample + element, mask=inside, other=0.0).to(tl.int32, bitcast=True), inside


@triton.jit(do_not_specialize=["row", "rank"])
def dynamic_threshold_kernel(
    magnitudes,  # (N, count) float32
    table,  # (rows, 32) float32
    counter,  # (1,) int64, or None
    scales,  # (N, 3) float32
    count,
    row,
    rows,
    rank,  # of the lower of the two values, below count
    fraction,  # of the way to the upper one
    maximum,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    at_sample = magnitudes + sample * count
    bins = tl.arange(0, BINS)
    left = rank.to(tl.int32)  # the rank among those that share the prefix
    prefix, equal = left * 0, left
    for level in range(0, 4):  # digits of 8, 8, 8 and 7 bits
        shift = tl.maximum(23 - 8 * level, 0)
        width = tl.minimum(31 - 8 * level, 8)
        counts = tl.zeros((BINS,), tl.int32)
        for tile in range(0, tl.cdiv(count, BLOCK)):
            bits, inside = load_bits(at_sample, tile, count, BLOCK)
            inside &= (bits >> (shift + width)) == prefix
            counts += tl.histogram((bits >> shift) & ((1 << width) - 1), BINS, mask=inside)
        digit = tl.sum((tl.cumsum(counts) <= left).to(tl.int32))
        left -= tl.sum(tl.where(bins < digit, counts, 0))
        equal = tl.sum(tl.where(bins == digit, counts, 0))
        prefix = (prefix << width) | digit

    above = tl.full((BLOCK,), NONE, tl.int32)
    largest = tl.zeros((BLOCK,), tl.int32)
    for tile in range(0, tl.cdiv(count, BLOCK)):
        bits, inside = load_bits(at_sample, tile, count, BLOCK)
        above = tl.minimum(above, tl.where(inside & (bits > prefix), bits, NONE))
        largest = tl.maximum(largest, bits)
    low = prefix.to(tl.float32, bitcast=True)
    high = tl.min(above).to(tl.float32, bitcast=True)
    s = tl.where((fraction == 0.0) | (left + 1 < equal), low, low + fraction * (high - low))

    at_row, _, valid = find_row(table, counter, row, rows)
    bound = coefficient(at_row, valid, CLIP)
    s = tl.where(s < bound, bound, s)
    s = tl.where(s > maximum, maximum, s)
    good = (tl.max(largest) <= INFINITE) & (bound > 0.0) & (bound < float("inf"))
    s = tl.where(good, s, float("nan"))
    tl.store(scales + 3 * sample, s)
    tl.store(scales + 3 * sample + 1, bound / s)
    tl.store(scales + 3 * sample + 2, 1.0)


def run(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    counter: Tensor | None,
    weights: Tensor | None,
    percentile: float,
    maximum: float,
) -> Tensor:
    """The registered operator's arguments; launches on the current stream of x's device."""
    x, m = x.contiguous(), dense(model_output)
    samples, count, output_count, last = sizes(x, m)
    rank = percentile * (count - 1)
    low = math.floor(rank)
    rows = table.shape[0]
    magnitudes = x.new_empty((samples, count), dtype=torch.float32)
    scales = x.new_empty((samples, 3), dtype=torch.float32)
    groups = len(m) // samples
    with torch.cuda.device_of(x):
        magnitudes_kernel[(samples * triton.cdiv(count, BLOCK),)](
            x, m, table, counter, weights, magnitudes, samples, count, output_count, last, row, rows,
            GROUPS=groups, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        dynamic_threshold_kernel[(samples,)](
            magnitudes, table, counter, scales, count, row, rows, low, rank - low, maximum,
            BLOCK=SELECT_BLOCK, num_warps=SELECT_WARPS,
        )  # fmt: skip
    return scales


def _case(kernel: Any, name: str, inner: int = 1, groups: int = 2, ones: tuple[str, ...] = (), **given: str) -> AotCase:
    """`ones`: integers that are 1, besides inner."""
    types = {"x": "*fp32", "table": "*fp32", "magnitudes": "*fp32", "scales": "*fp32"}
    types |= {pointer: f"*{dtype}" for pointer, dtype in given.items()}
    types |= dict.fromkeys(("samples", "count", "output_count", "row", "rows", "rank"), "i32")
    types |= {"fraction": "fp32", "maximum": "fp32"} | ({} if inner == 1 else {"inner": "i32"})
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    signature |= {argument: "constexpr" for argument in ones if argument in signature}
    writes = kernel is magnitudes_kernel
    constants = dict.fromkeys(ones, 1) | {"inner": 1, "GROUPS": groups, "BLOCK": BLOCK if writes else SELECT_BLOCK}
    return AotCase(
        name=f"{kernel.__name__} {name}",
        kernel=kernel,
        signature=signature,
        constexprs={argument: constants.get(argument) for argument, kind in signature.items() if kind == "constexpr"},
        num_warps=4 if writes else SELECT_WARPS,
        divisible=tuple(
            argument
            for argument, kind in signature.items()
            if kind.startswith("*") or argument in ("count", "output_count")
        ),
        wide_loads=0.5 if inner == 1 else 0.0,
        wide_stores=0.5 if writes else 0.0,  # the other writes three numbers
    )


AOT = [
    *(_case(magnitudes_kernel, dtype, model_output=dtype, counter="i64") for dtype in ("fp32", "fp16", "bf16")),
    *(_case(magnitudes_kernel, f"unguided {dtype}", groups=1, model_output=dtype) for dtype in ("fp32", "bf16")),
    _case(magnitudes_kernel, "weights", groups=3, model_output="bf16", weights="fp32"),
    _case(magnitudes_kernel, "channels-last", 4, model_output="bf16"),
    _case(magnitudes_kernel, "one sample, one row", ones=("samples", "rows"), model_output="bf16"),
    _case(dynamic_threshold_kernel, "select"),
    _case(dynamic_threshold_kernel, "select, one row", ones=("rows",)),
    _case(dynamic_threshold_kernel, "select, counter", counter="i64"),
]
