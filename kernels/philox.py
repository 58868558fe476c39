"""Counter-based standard normals inside a kernel: Philox4x32-10 and Box-Muller; the same as `csrc/philox.h`.

Key = the seed; counter = (block low, step, stream, block high), block = element / 4. `tl.philox` gives the words of
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Only operations that the interpreter has.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def radius(word):
    """sqrt(-2 ln u), u = word / 2^32 + 2^-33; the upper half of the words as ln(1 - f), where u itself would round."""
    upper = word >= 0x80000000
    folded = tl.where(upper, word ^ 0xFFFFFFFF, word)
    f = (folded * 2 + 1).to(tl.float32) * 1.1641532182693481e-10  # 2^-33; u or 1 - u, at most 1/2

    # ln u = exponent * ln 2 + ln(1 + t), with 1 + t in [sqrt(1/2), sqrt(2)).
    bits = f.to(tl.int32, bitcast=True)
    shifted = (bits - 0x3F3504F3) >> 23
    mantissa = (bits - (shifted << 23)).to(tl.float32, bitcast=True)
    below = f > 0.29289322
    t = tl.where(upper, tl.where(below, 1.0 - 2.0 * f, -f), mantissa - 1.0)
    exponent = tl.where(upper, tl.where(below, -1.0, 0.0), shifted.to(tl.float32))

    p = 0.06971612 * t - 0.11479734
    p = p * t + 0.1168542
    p = p * t - 0.12425687
    p = p * t + 0.14249058
    p = p * t - 0.16667803
    p = p * t + 0.20000716
    p = p * t - 0.24999997
    p = p * t + 0.3333333
    square = t * t
    low = p * square * t + (exponent * -2.12194440e-4 - 0.5 * square)
    return tl.sqrt_rn(-2.0 * (exponent * 0.693359375 + (t + low)))


@triton.jit
def cos_sin(word):
    """cos and sin of 2 pi word / 2^32: the quarter turn and what is left of it come from the integer, exactly."""
    quarter = (word + 0x20000000) >> 30
    x = (word - (quarter << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.862645149230957e-09  # 2^-29, of pi / 4
    z = x * x
    s = -3.595429e-05 * z + 0.0024900069
    s = s * z - 0.080745436
    s = (s * z + 0.7853982) * x
    c = 3.5419528e-06 * z - 0.0003259614
    c = c * z + 0.015854338
    c = c * z - 0.30842513
    c = c * z + 1.0
    swap = (quarter & 1) != 0
    cosine = tl.where(swap, s, c)
    sine = tl.where(swap, c, s)
    return tl.where(((quarter + 1) & 2) != 0, -cosine, cosine), tl.where((quarter & 2) != 0, -sine, sine)


@triton.jit
def low_word(value):
    return tl.to_tensor(value).to(tl.uint32)


@triton.jit
def normals(seed, element, step, stream, SIZE: tl.constexpr):
    """(SIZE,) float32: the normals of elements element .. element + SIZE - 1; element and SIZE are multiples of 4.

    seed: int64 scalar. step, stream: integer scalars or constants of 32 bits.
    """
    block = element // 4 + tl.arange(0, SIZE // 4)
    low = (block & 0xFFFFFFFF).to(tl.uint32)
    high = (block >> 32).to(tl.uint32)
    zero = tl.zeros((SIZE // 4,), tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, zero + low_word(step), zero + low_word(stream), high)
    first, second = radius(w0), radius(w2)
    cosine1, sine1 = cos_sin(w1)
    cosine2, sine2 = cos_sin(w3)
    pairs = tl.join(tl.join(first * cosine1, second * cosine2), tl.join(first * sine1, second * sine2))
    return tl.reshape(pairs, (SIZE,))
