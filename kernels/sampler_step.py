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
from fastdiff.kernels.layout import dense, inner
from fastdiff.kernels.philox import normals

BLOCK = 1024
STRIDED_BLOCK = 512  # for a channels-last model output: its addresses take more registers
STREAM_STEP = tl.constexpr(1)
ROW_SIZE = tl.constexpr(32)
# Where the coefficients stand in a row: fastdiff/ops/row.py.
GUIDANCE = tl.constexpr(0)
PREDICTION = tl.constexpr(1)
CLIP = tl.constexpr(3)
NEW_X = tl.constexpr(4)
NEW_HISTORY = tl.constexpr(12)
NEW_ANCHOR = tl.constexpr(20)
INPUT_SCALE = tl.constexpr(28)
X = tl.constexpr(0)
M = tl.constexpr(1)
D = tl.constexpr(2)
ANCHOR = tl.constexpr(3)
HIST1 = tl.constexpr(4)
HIST2 = tl.constexpr(5)
HIST3 = tl.constexpr(6)
NOISE = tl.constexpr(7)


@triton.jit
def coefficient(row, valid, column):
    """One scalar of the row; NaN for a row outside the table."""
    return tl.load(row + column, mask=valid, other=float("nan"))


@triton.jit
def coefficients(row, valid, column, output):
    """The eight of one output, over [x, m, D, anchor, hist1, hist2, hist3, noise]; 0 where it was not asked for."""
    if output is None:
        return 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    else:
        return (
            coefficient(row, valid, column),
            coefficient(row, valid, column + 1),
            coefficient(row, valid, column + 2),
            coefficient(row, valid, column + 3),
            coefficient(row, valid, column + 4),
            coefficient(row, valid, column + 5),
            coefficient(row, valid, column + 6),
            coefficient(row, valid, column + 7),
        )


@triton.jit
def is_used(new_x, new_history, new_anchor, INPUT: tl.constexpr):
    """Whether any output has a coefficient other than zero there."""
    return (new_x[INPUT] != 0.0) | (new_history[INPUT] != 0.0) | (new_anchor[INPUT] != 0.0)


@triton.jit
def load_input(pointer, offset, used, element, count, BLOCK: tl.constexpr):
    """The input as float32, not read unless used; NaN where it was not given."""
    if pointer is None:
        return tl.full((BLOCK,), float("nan"), tl.float32)
    else:
        return tl.load(pointer + offset, mask=element < tl.where(used, count, 0), other=0.0).to(tl.float32)


@triton.jit
def draw_input(seed, element, index, used, BLOCK: tl.constexpr):
    """The step's normals, not computed unless used."""
    z = tl.zeros((BLOCK,), tl.float32)
    if used:
        z = normals(tl.load(seed), element, index, STREAM_STEP, BLOCK)
    return z


@triton.jit
def term(c, value):
    """c * value, and 0 for a coefficient of zero whatever the value."""
    return tl.where(c != 0.0, c * value, 0.0)


@triton.jit
def combination(c, x, m, d, anchor, hist1, hist2, hist3, noise):
    """sum over the inputs, in their order, of c[i] * input i."""
    total = term(c[0], x) + term(c[1], m) + term(c[2], d) + term(c[3], anchor)
    return total + term(c[4], hist1) + term(c[5], hist2) + term(c[6], hist3) + term(c[7], noise)


@triton.jit(do_not_specialize=["row"])
def sampler_step_kernel(
    x,  # (N, count)
    model_output,  # (N, count), or (2N, count) where GUIDED
    table,  # (rows, 32) float32
    counter,  # (1,) int64, or None
    anchor,  # (N, count) float32, or None; so are hist1, hist2, hist3
    hist1,
    hist2,
    hist3,
    noise,  # (N, count), or None
    seeds,  # (N,) int64, or None; None where noise is given
    new_x,  # as x
    new_history,  # (N, count) float32, or None; so is new_anchor
    new_anchor,
    model_input,  # as model_output, or None
    samples,
    count,
    inner,  # C where model_output is channels-last, else 1
    row,
    rows,
    GUIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(count, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    begin = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK
    element = begin + tl.arange(0, BLOCK)
    mask = element < count
    offset = sample * count + element
    second = samples.to(tl.int64) * count  # from one half of the guided batch to the other

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
    state = load_input(x, offset, uses_x, element, count, BLOCK)
    if inner == 1:
        at = offset
    else:
        spatial = count // inner
        at = sample * count + element % spatial * inner + element // spatial
    m = load_input(model_output, at, uses_m, element, count, BLOCK)
    if GUIDED:
        conditional = load_input(model_output, at + second, uses_m, element, count, BLOCK)
        m += coefficient(at_row, valid, GUIDANCE) * (conditional - m)
    a = load_input(anchor, offset, is_used(cx, ch, ca, ANCHOR), element, count, BLOCK)
    h1 = load_input(hist1, offset, is_used(cx, ch, ca, HIST1), element, count, BLOCK)
    h2 = load_input(hist2, offset, is_used(cx, ch, ca, HIST2), element, count, BLOCK)
    h3 = load_input(hist3, offset, is_used(cx, ch, ca, HIST3), element, count, BLOCK)
    if seeds is None:
        z = load_input(noise, offset, is_used(cx, ch, ca, NOISE), element, count, BLOCK)
    else:
        z = draw_input(seeds + sample, begin, index, is_used(cx, ch, ca, NOISE), BLOCK)

    clip = coefficient(at_row, valid, CLIP)
    d = term(ax, state) + term(am, m)
    d = tl.where(d > clip, clip, d)  # NaN stays NaN
    d = tl.where(d < -clip, -clip, d)

    if new_history is not None:
        tl.store(new_history + offset, combination(ch, state, m, d, a, h1, h2, h3, z), mask=mask)
    if new_anchor is not None:
        tl.store(new_anchor + offset, combination(ca, state, m, d, a, h1, h2, h3, z), mask=mask)
    next_x = combination(cx, state, m, d, a, h1, h2, h3, z)
    tl.store(new_x + offset, next_x.to(new_x.dtype.element_ty), mask=mask)
    if model_input is not None:
        next_input = (coefficient(at_row, valid, INPUT_SCALE) * next_x).to(model_input.dtype.element_ty)
        tl.store(model_input + offset, next_input, mask=mask)
        if GUIDED:
            tl.store(model_input + second + offset, next_input, mask=mask)


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
    new_history: bool,
    new_anchor: bool,
    model_input: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The registered operator's arguments; launches on the current stream of x's device."""
    m = dense(model_output)
    next_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    history = x.new_empty(x.shape if new_history else (0,), dtype=torch.float32)
    next_anchor = x.new_empty(x.shape if new_anchor else (0,), dtype=torch.float32)
    next_input = x.new_empty((0,) if model_input is None else m.shape, dtype=model_input or x.dtype)
    samples, count = x.shape[0], x.numel() // x.shape[0]
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
            noise if noise is None else noise.contiguous(),
            seeds if noise is None else None,
            next_x,
            history if new_history else None,
            next_anchor if new_anchor else None,
            next_input if model_input is not None else None,
            samples,
            count,
            inner(m),
            row,
            table.shape[0],
            GUIDED=m.shape[0] != samples,
            BLOCK=block,
            num_warps=4,
        )
    return next_x, history, next_anchor, next_input


_POINTERS = (
    "counter",
    "anchor",
    "hist1",
    "hist2",
    "hist3",
    "noise",
    "seeds",
    "new_history",
    "new_anchor",
    "model_input",
)


def _case(name: str, dtype: str, inner: int = 1, guided: bool = True, **given: str) -> AotCase:
    pointers = {"x": "fp32", "model_output": dtype, "table": "fp32", "new_x": "fp32", "model_input": dtype, **given}
    signature = {
        argument: f"*{pointers[argument]}" if argument in pointers else "constexpr"
        for argument in sampler_step_kernel.arg_names
    }
    signature |= {"samples": "i32", "count": "i32", "inner": "i32", "row": "i32", "rows": "i32"}
    constexprs = {pointer: None for pointer in _POINTERS if pointer not in pointers}
    constexprs |= {"GUIDED": guided, "BLOCK": BLOCK if inner == 1 else STRIDED_BLOCK}
    if inner == 1:
        signature["inner"], constexprs["inner"] = "constexpr", 1
    return AotCase(
        name=name,
        kernel=sampler_step_kernel,
        signature=signature,
        constexprs=constexprs,
        divisible=(*pointers, "count"),
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
AOT = [
    *(_case(f"ddim {dtype}", dtype) for dtype in ("fp32", "fp16", "bf16")),
    *(_case(f"ddim unguided {dtype}", dtype, guided=False) for dtype in ("fp32", "bf16")),
    _case("dpmpp_2m", "fp16", hist1="fp32", new_history="fp32"),
    _case("everything, drawn", "fp16", counter="i64", seeds="i64", **_HISTORY),
    _case("everything, given", "fp16", counter="i64", noise="fp16", **_HISTORY),
    _case("everything, channels-last", "fp16", 4, counter="i64", seeds="i64", **_HISTORY),
]
