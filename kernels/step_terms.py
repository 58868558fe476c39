"""The parts of a sampler step: coefficients of the row, inputs that are read only where they count, and their sums."""

from __future__ import annotations

import triton
import triton.language as tl

from fastdiff.kernels.philox import normals

STREAM_INITIAL = tl.constexpr(0)
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
KNOWN = tl.constexpr(29)
VARIANCE = tl.constexpr(31)
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
def load_noise(
    pointer, seeds, sample, begin, step, STREAM: tl.constexpr, offset, used, element, count, BLOCK: tl.constexpr
):
    """The noise as float32 where it was given, else the sample's normals; neither read nor computed unless used."""
    if (pointer is not None) or (seeds is None):
        return load_input(pointer, offset, used, element, count, BLOCK)
    else:
        z = tl.zeros((BLOCK,), tl.float32)
        if used:
            z = normals(tl.load(seeds + sample), begin, step, STREAM, BLOCK)
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


@triton.jit
def weighted(base, model_output, at, stride, weights, used, element, count, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """w_0 * out_0 + sum over k of w_k * (out_k - out_0), with out_0 = base and out_k at stride * k from it."""
    m = term(tl.load(weights), base)
    for k in tl.static_range(1, GROUPS):
        weight = tl.load(weights + k)
        other = load_input(model_output, at + k * stride, used & (weight != 0.0), element, count, BLOCK)
        m += term(weight, other - base)
    return m


@triton.jit
def power_of_two(power):
    """2^power for integers from -126 to 127."""
    return ((power + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exponential(x):
    """e^x to float32, where `tl.exp` loses a digit for every tenfold x: 2^n e^r with x = n ln 2 + r."""
    capped = tl.where(x > 89.0, 89.0, tl.where(x < -104.0, -104.0, x))
    shifted = capped * 1.44269504 + 12582912.0  # 1.5 * 2^23 leaves the nearest integer in the low bits
    n = shifted - 12582912.0
    r = (capped - n * 0.693359375) + n * 2.12194440e-4
    power = shifted.to(tl.int32, bitcast=True) - 0x4B400000
    half = power >> 1  # 2^n itself can be out of range
    return tl.exp(r) * power_of_two(half) * power_of_two(power - half)


@triton.jit
def blend(share, made, kept):
    """share * made + (1 - share) * kept; at a share of 1 and 0 only that which counts."""
    mixed = share * made + (1.0 - share) * kept
    return tl.where(share == 1.0, made, tl.where(share == 0.0, kept, mixed))


@triton.jit
def per_sample(pointer, sample, COLUMN: tl.constexpr, otherwise):
    """A column of (N, 3) float32 for the sample, or what holds where there is no such array."""
    if pointer is None:
        return otherwise
    else:
        return tl.load(pointer + sample * 3 + COLUMN)
