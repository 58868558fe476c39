"""The weights of the guided output from inner products and deviations; see `fastdiff.ops.guidance_weights`.

Up to three kernels: inner products by chunks, deviations by chunks, and the weights of each sample.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.aot import AotCase
from fastdiff.kernels.layout import dense, inner
from fastdiff.kernels.prediction import cut
from fastdiff.kernels.sampler_step import term

BLOCK = 1024


@triton.jit
def group_values(model_output, group, sample, element, samples, count, output_count, channels, inner):
    """The group's elements that count as float32, in the order in which they lie."""
    begin = (group * samples + sample) * output_count  # sample is int64
    if inner == 1:
        at = begin + element
    else:
        at = begin + element // channels * inner + element % channels
    return tl.load(model_output + at, mask=element < count, other=0.0).to(tl.float32)


@triton.jit
def first_weight(weights, products, sample, chunks, GROUPS: tl.constexpr, PARTIALS: tl.constexpr):
    """w_1, less what the other groups have of d_1 where products are given."""
    own = tl.load(weights + sample * GROUPS + 1)
    if products is None:
        return own
    else:
        chunk = tl.arange(0, PARTIALS)
        at = products + (sample * chunks + chunk) * GROUPS
        square = tl.sum(tl.load(at + 1, mask=chunk < chunks, other=0.0).to(tl.float64))
        lost = square * 0.0
        for k in tl.static_range(2, GROUPS):
            product = tl.sum(tl.load(at + k, mask=chunk < chunks, other=0.0).to(tl.float64))
            lost += term(tl.load(weights + sample * GROUPS + k), product)
        lost = tl.where(square == 0.0, 0.0, lost / tl.where(square == 0.0, 1.0, square))
        return (own - lost).to(tl.float32)


@triton.jit
def products_kernel(
    model_output,  # (G * N, output_count)
    products,  # (N, chunks, G) float32: <d_k, d_1> at k
    samples,
    count,  # elements of a sample that count
    output_count,
    channels,  # channels-last: of each `inner` elements the first `channels` count
    inner,  # 1 where elements follow one another
    chunks,
    tiles,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,  # a power of two, at least GROUPS
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    groups = tl.arange(0, KEPT)
    total = tl.zeros((KEPT,), tl.float32)
    for tile in range(0, tiles):
        element = (chunk * tiles + tile) * BLOCK + tl.arange(0, BLOCK)
        first = group_values(model_output, 0, sample, element, samples, count, output_count, channels, inner)
        along = group_values(model_output, 1, sample, element, samples, count, output_count, channels, inner) - first
        total += tl.where(groups == 1, tl.sum(along * along), 0.0)
        for k in tl.static_range(2, GROUPS):
            group = group_values(model_output, k, sample, element, samples, count, output_count, channels, inner)
            total += tl.where(groups == k, tl.sum((group - first) * along), 0.0)
    tl.store(products + tl.program_id(0).to(tl.int64) * GROUPS + groups, total, mask=groups < GROUPS)


@triton.jit
def add_tile(values, inside, size, reference, mean, squares, merged):
    """The moments (distance of the mean to the reference, squared distances to the mean) of `merged` values and of a
    tile's. Distances in a tile are to its first value, so that equal values have squares of exactly 0."""
    lane = tl.arange(0, values.shape[0])
    first = tl.sum(tl.where(lane == 0, values, 0.0))
    reference = tl.where(merged == 0.0, first, reference)
    distance = tl.where(inside, values - first, 0.0)
    own = tl.sum(distance) / size
    centred = tl.where(inside, distance - own, 0.0)
    apart = (first - reference) + own - mean
    both = merged + size
    mean += apart * (size / both)
    squares += tl.sum(centred * centred) + apart * apart * (merged * size / both)
    return reference, mean, squares


@triton.jit
def deviations_kernel(
    model_output,  # (G * N, output_count)
    weights,  # (N, G) float32
    products,  # as products_kernel gives them, or None
    partial,  # (6, N, chunks) float32: reference, mean and squares of out_1, and of m
    samples,
    count,
    output_count,
    channels,
    inner,
    chunks,
    tiles,
    GROUPS: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    own = first_weight(weights, products, sample, chunks, GROUPS, PARTIALS)
    base = tl.load(weights + sample * GROUPS)
    # Taken from out_0, and so from m, so that a large mean does not cost m its last digits.
    center = tl.load(model_output + sample * output_count).to(tl.float32)
    reference1, mean1, squares1 = 0.0, 0.0, 0.0
    reference, mean, squares = 0.0, 0.0, 0.0
    begin = chunk * tiles * BLOCK
    merged = 0.0
    for tile in range(0, tl.minimum(tiles, tl.cdiv(count - begin, BLOCK))):
        element = begin + tile * BLOCK + tl.arange(0, BLOCK)
        inside = element < count
        size = tl.minimum(count - begin - tile * BLOCK, BLOCK).to(tl.float32)
        first = group_values(model_output, 0, sample, element, samples, count, output_count, channels, inner)
        group = group_values(model_output, 1, sample, element, samples, count, output_count, channels, inner)
        reference1, mean1, squares1 = add_tile(group, inside, size, reference1, mean1, squares1, merged)
        m = term(base, first - center) + term(own, group - first)
        for k in tl.static_range(2, GROUPS):
            group = group_values(model_output, k, sample, element, samples, count, output_count, channels, inner)
            m += term(tl.load(weights + sample * GROUPS + k), group - first)
        reference, mean, squares = add_tile(m, inside, size, reference, mean, squares, merged)
        merged += size
    plane = tl.num_programs(0).to(tl.int64)
    at = partial + tl.program_id(0)
    tl.store(at, reference1)
    tl.store(at + plane, mean1)
    tl.store(at + 2 * plane, squares1)
    tl.store(at + 3 * plane, reference)
    tl.store(at + 4 * plane, mean)
    tl.store(at + 5 * plane, squares)


@triton.jit
def all_squares(partial, plane, chunks, sizes, count, PARTIALS: tl.constexpr):
    """The squared distances to the mean of a whole sample, float64."""
    chunk = tl.arange(0, PARTIALS)
    taken = chunk < chunks
    reference = tl.load(partial)
    distance = tl.load(partial + chunk, mask=taken, other=0.0) - reference
    distance += tl.load(partial + plane + chunk, mask=taken, other=0.0)
    distance = tl.where(taken, distance.to(tl.float64), 0.0)
    apart = distance - tl.sum(distance * sizes) / count
    own = tl.load(partial + 2 * plane + chunk, mask=taken, other=0.0).to(tl.float64)
    return tl.sum(tl.where(taken, own + sizes * apart * apart, 0.0))


@triton.jit
def guidance_weights_kernel(
    weights,  # (N, G) float32; so is out
    products,  # as products_kernel gives them, or None
    partial,  # as deviations_kernel gives it, or None
    out,
    count,
    chunks,
    tiles,
    rescale,
    GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, KEPT)
    own = first_weight(weights, products, sample, chunks, GROUPS, PARTIALS)
    w = tl.load(weights + sample * GROUPS + group, mask=group < GROUPS, other=0.0)
    w = tl.where(group == 1, own, w)
    if partial is not None:
        begin = tl.arange(0, PARTIALS).to(tl.int64) * (tiles * BLOCK)
        sizes = tl.maximum(tl.minimum(count - begin, tiles * BLOCK), 0).to(tl.float64)
        plane = tl.num_programs(0).to(tl.int64) * chunks
        at = partial + sample * chunks
        conditional = all_squares(at, plane, chunks, sizes, count, PARTIALS)
        squares = all_squares(at + 3 * plane, plane, chunks, sizes, count, PARTIALS)
        constant = squares == 0.0
        ratio = tl.where(constant, 1.0, tl.sqrt(conditional / tl.where(constant, 1.0, squares)))
        w = w * (rescale * ratio + (1.0 - rescale)).to(tl.float32)
    tl.store(out + sample * GROUPS + group, w, mask=group < GROUPS)


def run(model_output: Tensor, weights: Tensor, rescale: float, perpendicular: bool, channels: int | None) -> Tensor:
    """The registered operator's arguments; launches on the current stream of model_output's device."""
    m, out = dense(model_output), torch.empty_like(weights)
    samples, groups = weights.shape
    last = inner(m)
    used = m.shape[1] if channels is None else channels
    output_count = m.numel() // len(m)
    count = output_count // m.shape[1] * used
    last = 1 if used == last else last
    chunks, tiles, partials = cut(count, BLOCK)
    products = m.new_empty((samples, chunks, groups), dtype=torch.float32) if perpendicular and groups > 2 else None
    partial = m.new_empty((6, samples, chunks), dtype=torch.float32) if rescale != 0.0 else None
    given = (samples, count, output_count, used, last, chunks, tiles)
    kept = triton.next_power_of_2(groups)
    grid = (samples * chunks,)
    with torch.cuda.device_of(m):
        if products is not None:
            products_kernel[grid](m, products, *given, GROUPS=groups, KEPT=kept, BLOCK=BLOCK, num_warps=4)
        if partial is not None:
            deviations_kernel[grid](
                m, weights, products, partial, *given, GROUPS=groups, PARTIALS=partials, BLOCK=BLOCK, num_warps=4
            )
        guidance_weights_kernel[(samples,)](
            weights, products, partial, out, count, chunks, tiles, rescale,
            GROUPS=groups, KEPT=kept, PARTIALS=partials, BLOCK=BLOCK, num_warps=1,
        )  # fmt: skip
    return out


def _case(
    kernel: Any, name: str, dtype: str, groups: int, *given: str, inner: int = 1, ones: tuple[str, ...] = ()
) -> AotCase:
    """`given`: those of products and partial that are there; `ones`: integers that are 1, besides inner."""
    types = {"model_output": f"*{dtype}", "weights": "*fp32", "out": "*fp32", "rescale": "fp32"}
    types |= dict.fromkeys(given, "*fp32")
    types |= dict.fromkeys(("samples", "count", "output_count", "channels", "chunks", "tiles"), "i32")
    types |= {} if inner == 1 else {"inner": "i32"}
    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    signature |= {argument: "constexpr" for argument in ones if argument in signature}
    constants = dict.fromkeys(ones, 1) | {
        "inner": 1,
        "GROUPS": groups,
        "KEPT": triton.next_power_of_2(groups),
        "PARTIALS": 64,
        "BLOCK": BLOCK,
    }
    reads = kernel is not guidance_weights_kernel
    return AotCase(
        name=f"{kernel.__name__} {name}",
        kernel=kernel,
        signature=signature,
        constexprs={argument: constants.get(argument) for argument, kind in signature.items() if kind == "constexpr"},
        num_warps=4 if reads else 1,
        divisible=tuple(
            argument
            for argument, kind in signature.items()
            if kind.startswith("*") or argument in ("count", "output_count")
        ),
        wide_loads=0.5 if reads and inner == 1 else 0.0,  # the last kernel reads a few numbers
        wide_stores=0.0,  # a few numbers
    )


AOT = [
    *(_case(products_kernel, dtype, dtype, 3, "products") for dtype in ("fp32", "fp16", "bf16")),
    *(_case(deviations_kernel, dtype, dtype, 2, "partial") for dtype in ("fp32", "fp16", "bf16")),
    _case(products_kernel, "first channels", "bf16", 3, "products", inner=8),
    _case(deviations_kernel, "first channels", "bf16", 2, "partial", inner=8),
    _case(deviations_kernel, "perpendicular", "bf16", 3, "products", "partial"),
    _case(guidance_weights_kernel, "rescaled", "fp32", 2, "partial"),
    _case(guidance_weights_kernel, "perpendicular", "fp32", 3, "products"),
    _case(guidance_weights_kernel, "both", "fp32", 3, "products", "partial"),
    *(
        _case(kernel, "one small sample", "fp32", 3, "products", "partial", ones=("samples", "chunks", "tiles"))
        for kernel in (products_kernel, deviations_kernel, guidance_weights_kernel)
    ),
]
