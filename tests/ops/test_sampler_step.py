"""sampler_step: one row of a table applied to every element."""

from __future__ import annotations

import math

import pytest
import torch
from backends import NATIVE, TARGETS, Target
from inputs import DTYPES, LAYOUTS
from step_rows import ALL, ROW, ROWS, SEEDS, arguments, check, step, table
from torch import Tensor

from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.noise import STREAM_STEP
from fastdiff.ops.row import INPUTS, PREDICTION

SHAPES = [(1, 1), (2, 3), (3, 5), (1, 1023), (3, 3, 5, 7), (2, 4, 33, 32)]
STATES = [("float32", "float32"), ("float32", "float16"), ("float32", "bfloat16")]
STATES += [("float16", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_rows(target: Target, name: str, guided: bool) -> None:
    check(target, arguments(ROWS[name], (2, 3, 5, 7), guided=guided))


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(("state", "model"), STATES)
@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_dtypes(target: Target, drawn: bool, state: str, model: str, guided: bool) -> None:
    check(target, arguments(ROWS["everything"], (2, 3, 5, 7), state=state, model=model, guided=guided, drawn=drawn))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_shapes(target: Target, layout: str, shape: tuple[int, ...]) -> None:
    guided = shape[0] != 2
    layout = layout if len(shape) == 4 else "contiguous"
    check(target, arguments(ROWS["everything"], shape, model="bfloat16", guided=guided, layout=layout))


@pytest.mark.parametrize("name", ["heun_2", "euler_ancestral", "only_x", "nothing"])
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_long_sums(target: Target, name: str) -> None:
    """Without anything between inputs and outputs a block is longer than elsewhere."""
    check(target, arguments(ROWS[name], (2, 20_011), drawn=False))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("target", [TARGETS[0], TARGETS[2]])
def test_truth_of_conversions(target: Target, dtype: str) -> None:
    """Every 16-bit number comes in as it is; numbers around each rounding boundary go out as PyTorch rounds them."""
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(DTYPES[dtype])
    bits = numbers.float().view(torch.int32)
    near = torch.stack([bits, bits + 1, bits + 2**12, bits + 2**15, bits + 2**15 + 1, bits - 1]).view(torch.float32)
    identity = table({"m": 1.0}, scale=1.0)
    given = {"x": torch.zeros(1, 2**16), "table": identity, "row": ROW}
    came = step(target, {**given, "model_output": numbers[None]}).x[0]
    torch.testing.assert_close(came, numbers.float(), rtol=0, atol=0, equal_nan=True)
    given["x"] = torch.zeros_like(near)
    went = step(target, {**given, "model_output": near, "model_input": DTYPES[dtype]}).model_input
    torch.testing.assert_close(went, near.to(DTYPES[dtype]), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("target", TARGETS)
def test_the_counter_is_added_to_the_row(target: Target) -> None:
    given = arguments(ROWS["everything"], (2, 3, 5, 7))
    expected = step(target, given)
    found = step(target, {**given, "row": 1, "counter": torch.tensor([ROW - 1])})
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("target", TARGETS)
def test_drawn_noise_is_philox_normal(target: Target) -> None:
    given = arguments(ROWS["only_noise"], (3, 4, 17, 5))
    with target.forced():
        noise = ops.philox_normal(SEEDS.to(target.device), (3, 4, 17, 5), step=ROW, stream=STREAM_STEP).cpu()
    assert torch.equal(step(target, given).x, torch.tensor(0.8) * noise)


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_an_unread_input_does_not_leak(target: Target, name: str) -> None:
    """NaN in an input reaches those outputs whose coefficient for it is not zero, and no others."""
    used = {
        "x": {n: c for n, c in ALL.items() if n != name},
        "history": {name: 1.0},
        "anchor": {"x": 1.0, "hist1": 1.0},
    }
    if name in ("x", "hist1"):
        used["anchor"] = {"noise": 1.0}
    # D is made of m alone or of x alone, so that it stays clean when the other is poisoned.
    rows = table(**used, prediction=(0.0, 1.0) if name == "x" else (1.0, 0.0), clip=2.0)
    given = arguments(rows, (2, 3, 5, 7), guided=True, drawn=False)
    poison = math.nan
    if name.startswith("hist"):
        index = int(name[-1]) - 1
        given["history"] = tuple(
            torch.full_like(h, poison) if i == index else h for i, h in enumerate(given["history"])
        )
    elif name == "D":
        rows[ROW, PREDICTION] = torch.tensor([math.nan, 0.0])
    else:
        key = "model_output" if name == "m" else name
        given[key] = torch.full_like(given[key], poison)
    out = step(target, given)
    assert out.x.isfinite().all()
    assert out.anchor.isfinite().all()
    assert out.model_input.isfinite().all()
    assert out.history.isnan().all()


@pytest.mark.parametrize("target", TARGETS)
def test_what_no_row_reads_may_be_poisoned(target: Target) -> None:
    given = arguments(ROWS["nothing"], (2, 3, 5, 7), guided=True)
    bad = torch.full((2, 3, 5, 7), math.nan)
    given |= {"x": bad, "model_output": torch.cat([bad, bad]), "anchor": bad, "history": (bad, bad, bad), "noise": bad}
    out = step(target, given)
    assert torch.equal(out.x, torch.zeros_like(bad))
    assert torch.equal(out.model_input, torch.zeros(4, 3, 5, 7))


@pytest.mark.parametrize("target", TARGETS)
def test_nan_survives_the_clip(target: Target) -> None:
    given = arguments(ROWS["clipped"], (2, 3))
    given["model_output"][1, 1] = math.nan
    out = step(target, given)
    assert out.x.isnan().nonzero().tolist() == [[1, 1]]
    assert float(out.history[out.history.isfinite()].abs().max()) == 0.5


@pytest.mark.parametrize("name", ["anchor", "hist1", "hist2", "hist3", "noise"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_missing_input_is_an_error(backend: str, name: str) -> None:
    given = arguments(ROWS[f"only_{name}"], (2, 3))
    given |= {
        "seeds": None,
        "anchor": None,
        "history": given["history"][: int(name[-1]) - 1] if name[-1].isdigit() else (),
    }
    remedy = "noise or seeds" if name == "noise" else name
    with pytest.raises(InputError, match=f"row 3 of the table uses {name}, which was not given; pass {remedy}$"):
        step(Target(backend, "cpu"), given)


@pytest.mark.parametrize("name", ["anchor", "hist2", "noise"])
@pytest.mark.parametrize("target", TARGETS[1:])
def test_a_missing_input_gives_nan_on_a_gpu(target: Target, name: str) -> None:
    given = arguments(ROWS[f"only_{name}"], (2, 3))
    given |= {"seeds": None, "anchor": None, "history": ()}
    assert step(target, given).x.isnan().all()


@pytest.mark.parametrize("counter", [1, -4])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_counter_outside_the_table_is_an_error(backend: str, counter: int) -> None:
    given = arguments(ROWS["ddim"], (2, 3)) | {"counter": torch.tensor([counter])}
    with pytest.raises(InputError, match=rf"row \+ counter = {ROW + counter} is outside the table's 4 rows"):
        step(Target(backend, "cpu"), given)


@pytest.mark.parametrize("counter", [1, -4])
@pytest.mark.parametrize("target", TARGETS[1:])
def test_a_counter_outside_the_table_gives_nan_on_a_gpu(target: Target, counter: int) -> None:
    given = arguments(ROWS["ddim"], (2, 3)) | {"counter": torch.tensor([counter])}
    assert step(target, given).x.isnan().all()


@pytest.mark.parametrize("target", TARGETS)
def test_a_sample_does_not_depend_on_the_batch(target: Target) -> None:
    given = arguments(ROWS["everything"], (3, 4, 17, 5), guided=True)
    batch = step(target, given)
    for n in range(3):
        one = {name: value[n : n + 1] if isinstance(value, Tensor) else value for name, value in given.items()}
        one["table"] = given["table"]
        one["model_output"] = given["model_output"][[n, n + 3]]
        one["history"] = tuple(h[n : n + 1] for h in given["history"])
        alone = step(target, one)
        for left, right in zip(alone[:3], batch[:3], strict=True):
            assert torch.equal(left, right[n : n + 1])
        assert torch.equal(alone.model_input, batch.model_input[[n, n + 3]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_do_not_change_the_bits(many_threads: None, layout: str) -> None:
    given = arguments(ROWS["everything"], (3, 8, 64, 64), guided=True, model="bfloat16", layout=layout)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(step(NATIVE, given))
    for other in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(results[0], other, strict=True))


def test_strided_inputs() -> None:
    given = arguments(ROWS["everything"], (2, 3, 4, 6), drawn=False)
    expected = step(NATIVE, given)
    for name in ("x", "model_output", "noise"):
        given[name] = torch.stack([given[name]] * 2, dim=-1)[..., 0]
    for left, right in zip(step(NATIVE, given), expected, strict=True):
        assert torch.equal(left, right)


def test_the_result_shares_no_memory() -> None:
    given = arguments(table({"x": 1.0}, scale=1.0), (2, 3))
    out = step(NATIVE, given)
    assert torch.equal(out.x, given["x"])
    assert len({out.x.data_ptr(), out.model_input.data_ptr(), given["x"].data_ptr()}) == 3
