"""Rows of a table, the arguments each needs, and sampler_step on them against the truth."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends import TARGETS, Target
from inputs import DTYPES, LAYOUTS, normal
from noise_truth import normals_truth
from tolerance import assert_close_to_truth
from torch import Tensor

from fastdiff import ops
from fastdiff.noise import STREAM_INITIAL, STREAM_STEP
from fastdiff.ops.row import (
    CLIP,
    GUIDANCE,
    INPUT_SCALE,
    INPUTS,
    KNOWN,
    NEW_ANCHOR,
    NEW_HISTORY,
    NEW_X,
    PREDICTION,
    ROW_SIZE,
    VARIANCE,
)

REFERENCE = Target("reference", "cpu")
EVERYWHERE = [*TARGETS, pytest.param(REFERENCE, id="reference")]

ROW = 3  # of four; the others hold NaN
SEEDS = torch.tensor([11, -12, 2**50])


def table(x: dict[str, float], history: dict[str, float] | None = None, anchor: dict[str, float] | None = None, **more):
    """A table whose row ROW has these coefficients by input name, with every other row poisoned."""
    rows = torch.full((4, ROW_SIZE), math.nan)
    row = torch.zeros(ROW_SIZE)
    row[GUIDANCE], row[CLIP], row[INPUT_SCALE] = 2.5, more.get("clip", math.inf), more.get("scale", 0.7)
    row[PREDICTION] = torch.tensor(more.get("prediction", (1.3, -0.6)))
    for block, coefficients in ((NEW_X, x), (NEW_HISTORY, history or {}), (NEW_ANCHOR, anchor or {})):
        row[block] = torch.tensor([coefficients.get(name, 0.0) for name in INPUTS])
    rows[ROW] = row
    return rows


ALL = {name: 0.3 + 0.1 * index for index, name in enumerate(INPUTS)}
ROWS = {
    "ddim": table({"x": 0.9, "D": 0.2}),
    "clipped": table({"x": 0.9, "D": 0.2}, {"D": 1.0}, clip=0.5),
    "dpmpp_2m": table({"x": 0.9, "D": 0.4, "hist1": -0.1}, {"D": 1.0}),
    "dpmpp_2m_sde": table({"x": 0.9, "D": 0.4, "hist1": -0.1, "noise": 0.3}, {"D": 1.0}),
    "euler_ancestral": table({"x": 1.0, "m": -0.4, "noise": 0.3}, scale=0.2),
    "heun_2": table({"m": -0.3, "anchor": 1.0, "hist1": -0.3}),
    "unipc": table(
        {name: ALL[name] for name in ("m", "D", "anchor", "hist1", "hist2", "hist3")},
        {"D": 1.0},
        {"anchor": 0.5, "m": 1},
    ),
    "kept_data": table({"x": 0.9, "D": 0.2}, None, {"D": 1.0}, clip=0.5),
    "kept_twice": table({"x": 0.9, "D": 0.2}, {"D": 1.0}, {"D": 1.0}),
    "everything": table(ALL, {n: -c for n, c in ALL.items()}, {n: c * c for n, c in ALL.items()}, clip=1.0),
    "nothing": table({}),
    **{f"only_{name}": table({name: 0.8}) for name in INPUTS},
}


def needs(rows: Tensor, name: str) -> bool:
    column = INPUTS.index(name)
    return any(rows[ROW, block][column] != 0 for block in (NEW_X, NEW_HISTORY, NEW_ANCHOR))


def arguments(
    rows: Tensor,
    shape: tuple[int, ...],
    *,
    state: str = "float32",
    model: str = "float32",
    guided: bool = False,
    layout: str = "contiguous",
    drawn: bool = True,
) -> dict[str, Any]:
    """What the row needs and nothing else, as the public function takes it."""
    m = normal(*((1 + guided) * shape[0], *shape[1:]), seed=2, dtype=DTYPES[model])
    given: dict[str, Any] = {
        "x": normal(*shape, seed=1, dtype=DTYPES[state]),
        "model_output": m.contiguous(memory_format=LAYOUTS[layout]),
        "table": rows,
        "row": ROW,
        "history": tuple(
            normal(*shape, seed=4 + i) for i in range(3) if any(needs(rows, f"hist{j}") for j in range(i + 1, 4))
        ),
        "new_history": bool((rows[ROW, NEW_HISTORY] != 0).any()),
        "new_anchor": bool((rows[ROW, NEW_ANCHOR] != 0).any()),
        "model_input": DTYPES[model],
    }
    if needs(rows, "anchor"):
        given["anchor"] = normal(*shape, seed=3)
    if needs(rows, "noise"):
        given |= {"seeds": SEEDS[: shape[0]]} if drawn else {"noise": normal(*shape, seed=8, dtype=DTYPES[model])}
    return given


FEATURES = ("weights", "variance", "scales", "kept")
MASKS = {"whole": (1, 1), "channels": (1, None), "samples": (None, 1), "elements": (None, None)}
"""The first two sizes of a mask, None for those of x."""


def mask_of(shape: tuple[int, ...], kind: str = "samples", seed: int = 24) -> Tensor:
    """A mask with zeros, ones and values between."""
    sizes = [size if given is None else given for given, size in zip(MASKS[kind], shape, strict=False)]
    return normal(*sizes, *shape[2:], seed=seed, mean=0.5).clamp(0.0, 1.0)


def extended(
    given: dict[str, Any],
    *features: str,
    groups: int = 2,
    mask: str = "samples",
    drawn: bool = True,
    layout: str = "contiguous",
) -> dict[str, Any]:
    """The arguments with these of FEATURES besides, and the coefficients that they need in the row."""
    shape, dtype = given["x"].shape, given["model_output"].dtype
    rows = given["table"].clone()
    rows[ROW, VARIANCE] = 0.4 if "variance" in features else 0.0
    rows[ROW, KNOWN] = torch.tensor([0.6, -0.8])
    sizes = (
        (groups * shape[0], shape[1] * (1 + ("variance" in features)), *shape[2:])
        if shape[1:]
        else (groups * shape[0],)
    )
    m = normal(*sizes, seed=2, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    more: dict[str, Any] = {"table": rows, "model_output": m}
    if "weights" in features:
        more["weights"] = normal(shape[0], groups, seed=20)
    if "scales" in features:
        more["scales"] = normal(shape[0], 3, seed=21).abs() + 0.2
    if "kept" in features:
        more |= {"known": normal(*shape, seed=22, dtype=dtype), "mask": mask_of(shape, mask)}
        more |= {"seeds": SEEDS[: shape[0]]} if drawn else {"known_noise": normal(*shape, seed=23, dtype=dtype)}
    return given | more


def step(target: Target, given: dict[str, Any]) -> ops.StepOutput:
    with target.forced():
        out = ops.sampler_step(**target.move(given))
    return ops.StepOutput(*(None if value is None else value.cpu() for value in out))


_AS_X = ("x", "model_output", "anchor", "noise", "known", "known_noise")


def truth(given: dict[str, Any]) -> ops.StepOutput:
    wide = {
        name: value.double() if name in _AS_X and isinstance(value, Tensor) else value for name, value in given.items()
    }
    wide |= {"history": tuple(h.double() for h in given["history"])}
    wide["model_input"] = None if given["model_input"] is None else torch.float64
    if "seeds" in given:
        seeds, shape = wide.pop("seeds"), given["x"].shape
        wide.setdefault("noise", normals_truth(seeds, shape, ROW, STREAM_STEP))
        if "known" in given:
            wide.setdefault("known_noise", normals_truth(seeds, shape, 0, STREAM_INITIAL))
    return step(REFERENCE, wide)


def check(target: Target, given: dict[str, Any]) -> ops.StepOutput:
    """Every output against the truth, and what was not asked for absent."""
    actual, exact, plain = step(target, given), truth(given), step(REFERENCE, given)
    for name, value, right, rough in zip(actual._fields, actual, exact, plain, strict=True):
        assert (value is None) == (right is None), name
        if value is not None:
            assert value.is_contiguous(), name
            assert value.dtype == rough.dtype, name
            assert_close_to_truth(value, right, rough)
    return actual
