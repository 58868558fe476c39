"""D = ax*x + am*m of a row, without clipping, a tile at a time: for the kernels that reduce it.

A sample is cut into chunks of tiles, each reduced by one program. How, depends on the sample's size alone.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.layout import inner
from fastdiff.kernels.sampler_step import GUIDANCE, PREDICTION, ROW_SIZE, coefficient, term

MAX_CHUNKS = 64


class Cut(NamedTuple):
    """chunks of `tiles` tiles each, the last one perhaps of fewer; partials: a power of two that holds the chunks."""

    chunks: int
    tiles: int
    partials: int


def cut(count: int, block: int) -> Cut:
    whole = triton.cdiv(count, block)
    tiles = triton.cdiv(whole, MAX_CHUNKS)
    chunks = triton.cdiv(whole, tiles)
    return Cut(chunks, tiles, triton.next_power_of_2(chunks))


def sizes(x: Tensor, model_output: Tensor) -> tuple[int, int, int, int]:
    """(samples, count, output_count, inner), as `predict` takes them; model_output is dense."""
    return len(x), x.numel() // len(x), model_output.numel() // len(model_output), inner(model_output)


@triton.jit
def find_row(table, counter, row, rows):
    """(the row, its index, whether it lies in the table)."""
    index = row.to(tl.int64)
    if counter is not None:
        index += tl.load(counter)
    return table + index * ROW_SIZE, index, (index >= 0) & (index < rows)


@triton.jit
def load_used(pointer, at, used, element, count):
    return tl.load(pointer + at, mask=element < tl.where(used, count, 0), other=0.0).to(tl.float32)


@triton.jit
def predict(
    x,  # (N, count)
    model_output,  # (G * N, output_count), of which the first count elements count
    weights,  # (N, G), or None
    at_row,  # as find_row gives it; so is valid
    valid,
    sample,
    element,  # int64
    samples,
    count,
    output_count,
    inner,  # C where model_output is channels-last, else 1
    GROUPS: tl.constexpr,
):
    """D of the elements, 0 outside the sample; NaN for a row outside the table."""
    ax = coefficient(at_row, valid, PREDICTION)
    am = coefficient(at_row, valid, PREDICTION + 1)
    state = load_used(x, sample * count + element, ax != 0.0, element, count)
    if inner == 1:
        at = element
    else:
        spatial = output_count // inner
        at = element % spatial * inner + element // spatial
    first = load_used(model_output, sample * output_count + at, am != 0.0, element, count)
    m = first
    if weights is not None:
        m = term(tl.load(weights + sample * GROUPS), first)
        for k in tl.static_range(1, GROUPS):
            w = tl.load(weights + sample * GROUPS + k)
            used = (am != 0.0) & (w != 0.0)
            group = load_used(model_output, (k * samples + sample) * output_count + at, used, element, count)
            m += term(w, group - first)
    elif GROUPS == 2:
        group = load_used(model_output, (samples + sample) * output_count + at, am != 0.0, element, count)
        m += coefficient(at_row, valid, GUIDANCE) * (group - first)
    return tl.where(element < count, term(ax, state) + term(am, m), 0.0)
