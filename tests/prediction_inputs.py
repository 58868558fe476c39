"""Arguments of the operators that reduce D = ax*x + am*m before a step, and the same in float64."""

from __future__ import annotations

import math
from typing import Any

import torch
from inputs import DTYPES, LAYOUTS, normal
from torch import Tensor

from fastdiff.ops.row import CLIP, GUIDANCE, PREDICTION, ROW_SIZE

ROW = 2  # of four; the others hold NaN
SEEDS = torch.tensor([11, -12, 2**50])
SHAPES = [(1, 1), (2, 3), (3, 5), (1, 1023), (3, 3, 5, 7), (2, 4, 33, 32)]
STATES = [("float32", "float32"), ("float32", "float16"), ("float32", "bfloat16")]
STATES += [("float16", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]


def table(prediction: tuple[float, float] = (1.3, -0.6), clip: float = 1.0) -> Tensor:
    """A table whose row ROW has these coefficients, with every other row poisoned."""
    rows = torch.full((4, ROW_SIZE), math.nan)
    rows[ROW] = 0.0
    rows[ROW, GUIDANCE], rows[ROW, CLIP], rows[ROW, PREDICTION] = 2.5, clip, torch.tensor(prediction)
    return rows


def arguments(
    shape: tuple[int, ...],
    *,
    groups: int = 1,
    weighted: bool = False,
    state: str = "float32",
    model: str = "float32",
    layout: str = "contiguous",
    variance: bool = False,
    mean: float = 0.0,
) -> dict[str, Any]:
    """x, model_output, table, row, and weights if they are asked for or needed; variance: twice the channels."""
    channels = () if len(shape) == 1 else (shape[1] * (2 if variance else 1),)
    m = normal(groups * shape[0], *channels, *shape[2:], seed=2, dtype=DTYPES[model], mean=mean)
    given: dict[str, Any] = {
        "x": normal(*shape, seed=1, dtype=DTYPES[state]),
        "model_output": m.contiguous(memory_format=LAYOUTS[layout]) if len(shape) == 4 else m,
        "table": table(),
        "row": ROW,
    }
    if weighted or groups > 2:
        given["weights"] = normal(shape[0], groups, seed=3)
    return given


def wide(given: dict[str, Any]) -> dict[str, Any]:
    """The same with everything but the table and the weights in float64."""
    kept = ("table", "weights", "seeds", "counter")
    return {
        name: value.double() if isinstance(value, Tensor) and name not in kept else value
        for name, value in given.items()
    }


def prediction(given: dict[str, Any]) -> Tensor:
    """D in float64, written out."""
    x, m = given["x"].double(), given["model_output"].double()
    outputs = (m if x.dim() < 2 else m[:, : x.shape[1]]).chunk(len(m) // len(x))
    row = given["table"][ROW].double()
    default = torch.tensor([1.0, float(row[GUIDANCE])])[: len(outputs)].expand(len(x), -1)
    weights = given.get("weights", default).double()
    per_sample = (-1, *(1,) * (x.dim() - 1))
    guided = weights[:, 0].reshape(per_sample) * outputs[0]
    for k, output in enumerate(outputs[1:], start=1):
        guided = guided + weights[:, k].reshape(per_sample) * (output - outputs[0])
    ax, am = row[PREDICTION]
    return (ax * x if ax else 0.0) + (am * guided if am else 0.0)
