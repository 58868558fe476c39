"""The meaning of a StepTable in a few lines of float64 NumPy: what every backend has to agree with."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from fastdiff.ops.row import (
    CLIP,
    GUIDANCE,
    INPUT_SCALE,
    INPUTS,
    NEW_ANCHOR,
    NEW_HISTORY,
    NEW_X,
    PREDICTION,
    VARIANCE,
)
from fastdiff.samplers import StepTable

Array = np.ndarray
Denoiser = Callable[[Array, float], Array]


def apply_row(
    row: Array,
    x: Array,
    m: Array,
    anchor: Array | None,
    history: Sequence[Array],
    noise: Array | None,
    snr: float = 0.0,
) -> list[Array | None]:
    """(x', history', anchor') of one row; an input whose coefficient is zero is not read."""
    ax, am = row[PREDICTION]
    values = dict(zip(INPUTS, (x, m, None, anchor, *[*history, None, None, None][:3], noise), strict=True))
    values["D"] = np.clip(ax * x + am * m, -row[CLIP], row[CLIP])
    if snr:
        size = 2.0 * (snr * norms(noise) / norms(values["D"])) ** 2
        values |= {"D": size * values["D"], "noise": np.sqrt(2.0 * size) * noise}
    blocks = []
    for block in (NEW_X, NEW_HISTORY, NEW_ANCHOR):
        terms = [c * values[name] for name, c in zip(INPUTS, row[block], strict=True) if c != 0.0]
        blocks.append(sum(terms) if terms else None)
    assert row[GUIDANCE] == 1.0
    return blocks


def norms(values: Array) -> Array:
    """Of each sample, along the first axis, shaped to multiply it."""
    rest = tuple(range(1, values.ndim))
    return np.sqrt((values**2).sum(axis=rest, keepdims=True))


def trajectory(
    denoiser: Denoiser, table: StepTable, x: Array, noise: Callable[[int], Array] | None = None
) -> Iterator[Array]:
    """The state after each row, from the state x; where variances are learned, the denoiser gives (m, v)."""
    anchor, history, scale = None, [], table.first_input_scale
    for index, (row, t) in enumerate(zip(table.rows, table.timesteps, strict=True)):
        m = denoiser(scale * x, float(t))
        drawn = noise(index) if noise is not None and table.uses[index].noise else None
        if table.learned_variance:
            m, v = m
            drawn = None if drawn is None else drawn * np.exp(row[VARIANCE] * v)
        x, new_history, new_anchor = apply_row(row, x, m, anchor, history, drawn, table.snr[index])
        history = history if new_history is None else [new_history, *history[:2]]
        anchor = anchor if new_anchor is None else new_anchor
        scale = row[INPUT_SCALE]
        yield x


def solve(denoiser: Denoiser, table: StepTable, x: Array, noise: Callable[[int], Array] | None = None) -> Array:
    """The state after the last row."""
    *_, last = trajectory(denoiser, table, x, noise)
    return last
