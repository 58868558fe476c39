"""sampler_step's CUDA kernel, run on the CPU by the shim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_shim import ORDERS, Launchers
from inputs import DTYPES, LAYOUTS, normal
from tolerance import assert_close_to_truth

from fastdiff.noise import STREAM_STEP
from fastdiff.ops import reference
from fastdiff.ops.row import CLIP, GUIDANCE, INPUT_SCALE, NEW_ANCHOR, NEW_HISTORY, NEW_X, PREDICTION, ROW_SIZE

SEEDS = torch.tensor([7, -8])
SHAPES = {"chunks": (2, 4, 4, 6), "remainder": (2, 3, 5, 3), "one_element": (1, 1, 1, 1), "blocks": (2, 4, 24, 24)}
GIVEN = ("anchor", "hist1", "hist2", "hist3", "noise")


def full_row(seed: int) -> torch.Tensor:
    """A row of which every coefficient counts, clipping included."""
    row = torch.zeros(ROW_SIZE)
    row[NEW_X.start : NEW_ANCHOR.stop] = normal(24, seed=seed)
    row[GUIDANCE], row[PREDICTION], row[CLIP], row[INPUT_SCALE] = 2.5, torch.tensor([1.25, -0.75]), 0.8, 1.5
    return row


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, guided: bool = True, layout: str = "contiguous"
) -> dict[str, Any]:
    """Those of the schema, by name: everything given, everything asked for, the row at 1 + 1."""
    output_shape = (shape[0] * (2 if guided else 1), *shape[1:])
    floats = {name: normal(*shape, seed=10 + i) for i, name in enumerate(GIVEN)}
    return {
        "x": normal(*shape, seed=1),
        "model_output": normal(*output_shape, seed=2, dtype=dtype).contiguous(memory_format=LAYOUTS[layout]),
        "table": torch.stack([full_row(seed) for seed in range(3)]),
        "row": 1,
        "counter": torch.tensor([1]),
        **{name: floats[name] for name in GIVEN[:4]},
        "noise": floats["noise"].to(dtype),
        "seeds": None,
        **dict.fromkeys(("weights", "scales", "known", "known_noise", "mask")),
        "new_history": True,
        "new_anchor": True,
        "copies": None,
        "model_input": dtype,
    }


def wide(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def check(shim: Launchers, args: dict[str, Any]) -> None:
    results = shim.sampler_step(*args.values())
    plain = dict(args)
    if args["seeds"] is not None and args["noise"] is None:  # as philox_normal draws, which is held to its own truth
        plain["noise"] = shim.philox_normal(args["seeds"], list(args["x"].shape), 2, STREAM_STEP, torch.float32)
    exact = {name: wide(value) for name, value in plain.items()}
    exact["model_input"] = None if args["model_input"] is None else torch.float64
    truths, plains = reference.sampler_step(*exact.values()), reference.sampler_step(*plain.values())
    for result, truth, expected in zip(results, truths, plains, strict=True):
        if result is not None:
            assert result.dtype == expected.dtype
            assert_close_to_truth(result, truth, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "plain"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_everything(shim: Launchers, shape: str, dtype: str, guided: bool, layout: str) -> None:
    check(shim, arguments(SHAPES[shape], DTYPES[dtype], guided, layout))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_noise(shim: Launchers, shape: str, order: str) -> None:
    shim.device(order)
    sizes = SHAPES[shape]
    check(shim, arguments(sizes) | {"noise": None, "seeds": SEEDS[: sizes[0]]})


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_in_the_networks_dtype(shim: Launchers, dtype: str) -> None:
    args = arguments((2, 4, 4, 6))
    check(shim, args | {"x": args["x"].to(DTYPES[dtype])})


@pytest.mark.parametrize("shape", SHAPES)
def test_only_what_is_asked_for(shim: Launchers, shape: str) -> None:
    nothing = {"counter": None, "row": 2, "new_history": False, "new_anchor": False, "model_input": None}
    check(shim, arguments(SHAPES[shape]) | nothing)


@pytest.mark.parametrize("shape", ["chunks", "remainder"])
@pytest.mark.parametrize("kept", ["x", "m", "D", *GIVEN])
def test_a_zero_coefficient_reads_nothing(shim: Launchers, kept: str, shape: str) -> None:
    """Every input but one is NaN, and every coefficient but that input's zero."""
    column = ["x", "m", "D", *GIVEN].index(kept)
    args = arguments(SHAPES[shape])
    row = torch.zeros(3, ROW_SIZE)
    row[:, [NEW_X.start + column, NEW_HISTORY.start + column, NEW_ANCHOR.start + column]] = 0.5
    row[:, [GUIDANCE, CLIP, INPUT_SCALE]] = torch.tensor([2.0, torch.inf, 1.0])
    row[:, PREDICTION] = torch.tensor([0.0, 1.0]) if kept == "D" else torch.tensor([torch.nan, torch.nan])
    used = "model_output" if kept in ("m", "D") else kept
    for name in ("x", "model_output", *GIVEN):
        if name != used:
            args[name] = torch.full_like(args[name], torch.nan)
    args["table"] = row
    assert shim.sampler_step(*args.values())[0].isfinite().all()
    check(shim, args)


@pytest.mark.parametrize("missing", GIVEN)
def test_a_missing_tensor_gives_nan(shim: Launchers, missing: str) -> None:
    results = shim.sampler_step(*(arguments((2, 4, 4, 6)) | {missing: None}).values())
    assert all(result.isnan().all() for result in results)


@pytest.mark.parametrize("counter", [2, -2], ids=["behind", "before"])
def test_a_row_outside_the_table_gives_nan(shim: Launchers, counter: int) -> None:
    results = shim.sampler_step(*(arguments((2, 4, 4, 6)) | {"counter": torch.tensor([counter])}).values())
    assert all(result.isnan().all() for result in results)


def test_nan_is_not_clipped(shim: Launchers) -> None:
    args = arguments((2, 4, 4, 6))
    args["table"][:, NEW_X] = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    args["x"][0, 0, 0, 0] = torch.nan
    assert shim.sampler_step(*args.values())[0].isnan().sum() == 1


def test_an_input_reaches_only_its_outputs(shim: Launchers) -> None:
    """hist1 is infinite and counts for x' alone."""
    args = arguments((2, 4, 4, 6))
    args["hist1"] = torch.full_like(args["hist1"], torch.inf)
    for block in (NEW_HISTORY, NEW_ANCHOR):
        args["table"][:, block.start + 4] = 0.0
    x, history, anchor, _ = shim.sampler_step(*args.values())
    assert x.isinf().all()
    assert history.isfinite().all()
    assert anchor.isfinite().all()


@pytest.mark.parametrize("name", ["x", "model_output", "hist1", "noise", "table"])
def test_unaligned_addresses(shim: Launchers, name: str) -> None:
    args = arguments((2, 4, 4, 6), torch.float16)
    value = args[name]
    args[name] = torch.empty(value.numel() + 1, dtype=value.dtype)[1:].view(value.shape).copy_(value)
    check(shim, args)
