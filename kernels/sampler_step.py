"""One row of a step table applied to every element in one pass over memory; see `fastdiff.ops.sampler_step`.

A coefficient of zero masks its load. What the row needs and was not given, or a row outside the table, gives NaN: the
table lies on the device and is not read here.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.aot import AotCase
from fastdiff.kernels.layout import contiguous, dense, inner
from fastdiff.kernels.step_terms import (
    ANCHOR,
    CLIP,
    GUIDANCE,
    HIST1,
    HIST2,
    HIST3,
    INPUT_SCALE,
    KNOWN,
    NEW_ANCHOR,
    NEW_HISTORY,
    NEW_X,
    NOISE,
    PREDICTION,
    ROW_SIZE,
    STREAM_INITIAL,
    STREAM_STEP,
    VARIANCE,
    D,
    M,
    X,
    blend,
    coefficient,
    coefficients,
    combination,
    exponential,
    is_used,
    load_input,
    load_noise,
    per_sample,
    term,
    weighted,
)

BLOCK = 1024
STRIDED_BLOCK = 512  # for a channels-last model output: its addresses take more registers


@triton.jit(do_not_specialize=["row"])
def sampler_step_kernel(
    x,  # (N, count)
    model_output,  # (GROUPS * N, output_count)
    table,  # (rows, 32) float32
    counter,  # (1,) int64, or None
    anchor,  # (N, count) float32, or None; so are hist1, hist2, hist3
    hist1,
    hist2,
    hist3,
    noise,  # (N, count), or None; so are known and known_noise
    seeds,  # (N,) int64, or None
    weights,  # (N, GROUPS) float32, or None
    scales,  # (N, 3) float32, or None
    known,
    known_noise,
    mask,  # (1 or N, mask_count) float32, or None
    new_x,  # as x
    new_history,  # (N, count) float32, or None; so is new_anchor
    new_anchor,
    model_input,  # (COPIES * N, count), or None
    samples,
    count,
    output_count,  # count, or 2 * count where VARIED: the second half is the variance
    inner,  # the channels of model_output where it is channels-last, else 1
    mask_count,
    mask_stride,  # from one sample's mask to the next, or 0
    row,
    rows,
    GROUPS: tl.constexpr,
    VARIED: tl.constexpr,
    COPIES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(count, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    begin = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    element = begin + tl.arange(0, BLOCK)
    inside = element < count
    offset = sample * count + element
    batch = tl.to_tensor(samples).to(tl.int64)

    index = row.to(tl.int64)
    if counter is not None:
        index += tl.load(counter)
    valid = (index >= 0) & (index < rows)
    at_row = table + index * ROW_SIZE
    ax = coefficient(at_row, valid, PREDICTION)
    am = coefficient(at_row, valid, PREDICTION + 1)
    cx = coefficients(at_row, valid, NEW_X, new_x)
    ch = coefficients(at_row, valid, NEW_HISTORY, new_history)
    ca = coefficients(at_row, valid, NEW_ANCHOR, new_anchor)

    uses_d = is_used(cx, ch, ca, D)
    uses_x = is_used(cx, ch, ca, X) | (uses_d & (ax != 0.0))
    uses_m = is_used(cx, ch, ca, M) | (uses_d & (am != 0.0))
    uses_z = is_used(cx, ch, ca, NOISE)
    state = load_input(x, offset, uses_x, element, count, BLOCK)
    if inner == 1:
        at = sample * output_count + element
        variance_at = at + count
    else:
        spatial = output_count // inner
        at = sample * output_count + element % spatial * inner + element // spatial
        variance_at = at + inner // 2
    m = load_input(model_output, at, uses_m, element, count, BLOCK)
    if weights is not None:
        m = weighted(
            m, model_output, at, batch * output_count, weights + sample * GROUPS, uses_m, element, count, GROUPS, BLOCK
        )
    elif GROUPS == 2:
        conditional = load_input(model_output, at + batch * output_count, uses_m, element, count, BLOCK)
        m += coefficient(at_row, valid, GUIDANCE) * (conditional - m)
    a = load_input(anchor, offset, is_used(cx, ch, ca, ANCHOR), element, count, BLOCK)
    h1 = load_input(hist1, offset, is_used(cx, ch, ca, HIST1), element, count, BLOCK)
    h2 = load_input(hist2, offset, is_used(cx, ch, ca, HIST2), element, count, BLOCK)
    h3 = load_input(hist3, offset, is_used(cx, ch, ca, HIST3), element, count, BLOCK)
    z = load_noise(noise, seeds, sample, begin, index, STREAM_STEP, offset, uses_z, element, count, BLOCK)
    z *= per_sample(scales, sample, 2, 1.0)
    spread = coefficient(at_row, valid, VARIANCE)
    v = tl.full((BLOCK,), float("nan"), tl.float32)
    if VARIED:
        variance_at += (GROUPS - 1) * batch * output_count
        v = load_input(model_output, variance_at, uses_z & (spread != 0.0), element, count, BLOCK)
    z = tl.where(spread != 0.0, z * exponential(spread * v), z)

    bound = per_sample(scales, sample, 0, coefficient(at_row, valid, CLIP))
    d = term(ax, state) + term(am, m)
    d = tl.where(d > bound, bound, d)  # NaN stays NaN
    d = tl.where(d < -bound, -bound, d) * per_sample(scales, sample, 1, 1.0)

    if new_history is not None:
        tl.store(new_history + offset, combination(ch, state, m, d, a, h1, h2, h3, z), mask=inside)
    if new_anchor is not None:
        tl.store(new_anchor + offset, combination(ca, state, m, d, a, h1, h2, h3, z), mask=inside)
    next_x = combination(cx, state, m, d, a, h1, h2, h3, z)
    if mask is not None:
        signal = coefficient(at_row, valid, KNOWN)
        spread = coefficient(at_row, valid, KNOWN + 1)
        image = load_input(known, offset, signal != 0.0, element, count, BLOCK)
        z = load_noise(
            known_noise, seeds, sample, begin, 0, STREAM_INITIAL, offset, spread != 0.0, element, count, BLOCK
        )
        share = tl.load(mask + sample * mask_stride + element % mask_count, mask=inside, other=1.0)
        next_x = blend(share, next_x, term(signal, image) + term(spread, z))
    tl.store(new_x + offset, next_x.to(new_x.dtype.element_ty), mask=inside)
    if model_input is not None:
        next_input = (coefficient(at_row, valid, INPUT_SCALE) * next_x).to(model_input.dtype.element_ty)
        for copy in tl.static_range(COPIES):
            tl.store(model_input + copy * batch * count + offset, next_input, mask=inside)


def run(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    counter: Tensor | None,
    anchor: Tensor | None,
    hist1: Tensor | None,
    hist2: Tensor | None,
    hist3: Tensor | None,
    noise: Tensor | None,
    seeds: Tensor | None,
    weights: Tensor | None,
    scales: Tensor | None,
    known: Tensor | None,
    known_noise: Tensor | None,
    mask: Tensor | None,
    new_history: bool,
    new_anchor: bool,
    copies: int | None,
    model_input: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The registered operator's arguments; launches on the current stream of x's device."""
    m = dense(model_output)
    samples, count, groups = x.shape[0], x.numel() // x.shape[0], m.shape[0] // x.shape[0]
    output_count, copies = m.numel() // m.shape[0], copies or groups
    input_shape = (0,) if model_input is None else (copies * samples, *x.shape[1:])
    next_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    history = x.new_empty(x.shape if new_history else (0,), dtype=torch.float32)
    next_anchor = x.new_empty(x.shape if new_anchor else (0,), dtype=torch.float32)
    next_input = x.new_empty(input_shape, dtype=model_input or x.dtype)
    mask_count = 1 if mask is None else mask.numel() // mask.shape[0]
    block = BLOCK if inner(m) == 1 else STRIDED_BLOCK
    with torch.cuda.device_of(x):
        grid = (samples * triton.cdiv(count, block),)
        sampler_step_kernel[grid](
            x.contiguous(),
            m,
            table,
            counter,
            anchor,
            hist1,
            hist2,
            hist3,
            contiguous(noise),
            seeds,
            weights,
            scales,
            contiguous(known),
            contiguous(known_noise),
            contiguous(mask),
            next_x,
            history if new_history else None,
            next_anchor if new_anchor else None,
            next_input if model_input is not None else None,
            samples,
            count,
            output_count,
            inner(m),
            mask_count,
            mask_count if mask is not None and mask.shape[0] > 1 else 0,
            row,
            table.shape[0],
            GROUPS=groups,
            VARIED=output_count != count,
            COPIES=copies,
            BLOCK=block,
            num_warps=4,
        )
    return next_x, history, next_anchor, next_input


def _case(
    name: str, dtype: str, inner: int = 1, groups: int = 2, varied: bool = False, samples: int = 2, **given: str
) -> AotCase:
    pointers = {"x": "fp32", "model_output": dtype, "table": "fp32", "new_x": "fp32", "model_input": dtype, **given}
    constexprs = {"GROUPS": groups, "VARIED": varied, "COPIES": groups, "BLOCK": BLOCK if inner == 1 else STRIDED_BLOCK}
    constexprs |= {argument: 1 for argument, value in (("inner", inner), ("samples", samples)) if value == 1}
    if "mask" not in given:
        constexprs["mask_count"] = 1
    integers = {"samples", "count", "output_count", "inner", "mask_count", "mask_stride", "row", "rows"}
    signature = {}
    for argument in sampler_step_kernel.arg_names:
        if argument in pointers:
            signature[argument] = f"*{pointers[argument]}"
        elif argument in integers and argument not in constexprs:
            signature[argument] = "i32"
        else:
            signature[argument] = "constexpr"
            constexprs.setdefault(argument, None)
    divisible = ("count", "output_count", "mask_stride", *(["mask_count"] if "mask" in given else []))
    return AotCase(
        name=name,
        kernel=sampler_step_kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=(*pointers, *divisible),
        wide_loads=0.5 if inner == 1 else 0.0,
    )


_HISTORY = {
    "anchor": "fp32",
    "hist1": "fp32",
    "hist2": "fp32",
    "hist3": "fp32",
    "new_history": "fp32",
    "new_anchor": "fp32",
}
_KEPT = {"known": "fp32", "mask": "fp32", "seeds": "i64"}
_FACTORS = {"weights": "fp32", "scales": "fp32", **_KEPT}
AOT = [
    *(_case(f"ddim {dtype}", dtype) for dtype in ("fp32", "fp16", "bf16")),
    *(_case(f"ddim unguided {dtype}", dtype, groups=1) for dtype in ("fp32", "bf16")),
    _case("dpmpp_2m, one sample", "fp16", samples=1, hist1="fp32", new_history="fp32"),
    _case("everything, drawn", "fp16", counter="i64", seeds="i64", **_HISTORY),
    _case("everything, given", "fp16", counter="i64", noise="fp16", **_HISTORY),
    _case("everything, channels-last", "fp16", 4, counter="i64", seeds="i64", **_HISTORY),
    _case("weighted groups", "fp16", groups=4, weights="fp32"),
    _case("variance and scales", "bf16", varied=True, noise="bf16", scales="fp32"),
    _case("kept, given noise", "fp16", **_KEPT, known_noise="fp32"),
    _case("all, drawn", "fp16", groups=3, varied=True, counter="i64", **_HISTORY, **_FACTORS),
    _case("all, channels-last", "fp16", 8, groups=3, varied=True, counter="i64", **_HISTORY, **_FACTORS),
]
