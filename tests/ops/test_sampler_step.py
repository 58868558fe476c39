"""sampler_step: one row of a table applied to every element."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends import NATIVE, TARGETS, Target
from inputs import DTYPES, LAYOUTS, normal
from noise_truth import normals_truth
from tolerance import assert_close_to_truth
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.noise import STREAM_STEP
from fastdiff.ops.row import CLIP, GUIDANCE, INPUT_SCALE, INPUTS, NEW_ANCHOR, NEW_HISTORY, NEW_X, PREDICTION, ROW_SIZE

ROW = 3  # of four; the others hold NaN
SEEDS = torch.tensor([11, -12, 2**50])
SHAPES = [(1, 1), (2, 3), (3, 5), (1, 1023), (3, 3, 5, 7), (2, 4, 33, 32)]
STATES = [("float32", "float32"), ("float32", "float16"), ("float32", "bfloat16")]
STATES += [("float16", "float16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]


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


def step(target: Target, given: dict[str, Any]) -> ops.StepOutput:
    with target.forced():
        out = ops.sampler_step(**target.move(given))
    return ops.StepOutput(*(None if value is None else value.cpu() for value in out))


def truth(given: dict[str, Any]) -> ops.StepOutput:
    wide = {
        name: value.double() if name != "seeds" and isinstance(value, Tensor) else value
        for name, value in given.items()
    }
    wide |= {"table": given["table"], "history": tuple(h.double() for h in given["history"])}
    wide["model_input"] = None if given["model_input"] is None else torch.float64
    if "seeds" in given:
        wide["noise"] = normals_truth(wide.pop("seeds"), given["x"].shape, ROW, STREAM_STEP)
    return step(Target("reference", "cpu"), wide)


def check(target: Target, given: dict[str, Any]) -> ops.StepOutput:
    """Every output against the truth, and what was not asked for absent."""
    actual, exact, plain = step(target, given), truth(given), step(Target("reference", "cpu"), given)
    for name, value, right, rough in zip(actual._fields, actual, exact, plain, strict=True):
        assert (value is None) == (right is None), name
        if value is not None:
            assert value.is_contiguous(), name
            assert value.dtype == rough.dtype, name
            assert_close_to_truth(value, right, rough)
    return actual


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


OPTIONAL = ("counter", "anchor", "hist1", "hist2", "hist3", "noise", "seeds")


@pytest.mark.parametrize("name", ["ddim", "everything"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_opcheck(name: str, guided: bool) -> None:
    given = arguments(ROWS[name], (2, 3, 4, 5), guided=guided, model="bfloat16", layout="channels_last")
    given |= {f"hist{i + 1}": h for i, h in enumerate(given["history"])}
    flat = [given[key] for key in ("x", "model_output", "table", "row")] + [given.get(key) for key in OPTIONAL]
    flat += [given["new_history"], given["new_anchor"], given["model_input"] if guided else None]
    torch.library.opcheck(torch.ops.fastdiff.sampler_step.default, tuple(flat))


def test_compiles_whole() -> None:
    given = arguments(ROWS["everything"], (2, 3, 4, 5), guided=True)
    options = {key: given[key] for key in ("anchor", "history", "seeds", "new_history", "new_anchor", "model_input")}

    def forward(x: Tensor, m: Tensor, rows: Tensor) -> tuple[Tensor | None, ...]:
        return tuple(ops.sampler_step(2 * x, m, rows, ROW, **options))

    operands = (given["x"], given["model_output"], given["table"])
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")(*operands)
    for left, right in zip(compiled, forward(*operands), strict=True):
        assert torch.equal(left, right)


def test_gradients_through_the_reference() -> None:
    given = arguments(ROWS["ddim"], (2, 3))
    m = given["model_output"].requires_grad_()
    with pytest.raises(InputError, match=r"sampler_step: an input requires grad.*use_backend\('reference'\)"):
        step(NATIVE, given)
    step(Target("reference", "cpu"), given).x.sum().backward()
    torch.testing.assert_close(m.grad, torch.full((2, 3), 0.2 * -0.6))


def test_calls_are_counted_and_explained() -> None:
    given = arguments(ROWS["ddim"], (2, 3))
    fastdiff.report(reset=True)
    ops.sampler_step(**given)
    assert fastdiff.report().calls == {("sampler_step", "native"): 1}
    assert fastdiff.explain("sampler_step", **given).startswith("sampler_step: native")
    with torch.profiler.profile() as profile:
        ops.sampler_step(**given)
    assert "fastdiff::sampler_step" in {event.name for event in profile.events()}


def test_fake_tensors_are_not_run() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    given = arguments(ROWS["ddim"], (2, 3), model="bfloat16")
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in given.items()}
        inside = ops.sampler_step(**fakes)
    outside = ops.sampler_step(**fakes)
    for out in (inside, outside):
        assert (out.x.shape, out.x.dtype, out.model_input.dtype) == ((2, 3), torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, r"x is torch.int64; expected float32"),
        ({"x": torch.tensor(1.0)}, r"x has shape \(\); expected \(N, ...\) with at least one element"),
        ({"x": torch.zeros(0, 3)}, r"x has shape \(0, 3\); expected \(N, ...\) with at least one element"),
        ({"model_output": torch.zeros(2, 3, dtype=torch.int32)}, r"model_output is torch.int32; expected float32"),
        ({"model_output": torch.zeros(3, 3)}, r"model_output has shape \(3, 3\); expected \(2, 3\), or \(4, 3\)"),
        ({"model_output": torch.zeros(2, 3, device="meta")}, r"model_output is on meta, the first tensor on cpu"),
        ({"table": torch.zeros(4, 31)}, r"table is torch.float32 of shape \(4, 31\); expected contiguous float32"),
        ({"table": torch.zeros(4, 32, dtype=torch.float64)}, r"table is torch.float64 of shape \(4, 32\)"),
        ({"row": 4}, r"row 4 is outside the table's 4 rows"),
        ({"row": -1}, r"row -1 is outside the table's 4 rows"),
        ({"counter": torch.tensor([1.0])}, r"counter is torch.float32 of 1 elements; expected int64 \(1,\)"),
        ({"counter": torch.tensor([1, 2])}, r"counter is torch.int64 of 2 elements; expected int64 \(1,\)"),
        ({"anchor": torch.zeros(3, 2)}, r"anchor or history has shape \(3, 2\) on cpu; expected contiguous \(2, 3\)"),
        ({"anchor": torch.zeros(2, 3, dtype=torch.float16)}, r"anchor or history is torch.float16; expected float32"),
        ({"history": (torch.zeros(3, 2).t(),)}, r"anchor or history has shape \(2, 3\) on cpu; expected contiguous"),
        ({"history": (torch.zeros(2, 3),) * 4}, r"history has 4 tensors; expected at most 3, newest first"),
        ({"noise": torch.zeros(2)}, r"noise has shape \(2,\); expected \(2, 3\)"),
        ({"seeds": torch.tensor([1])}, r"seeds is torch.int64 of shape \(1,\); expected int64 \(2,\), one per sample"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_errors(change: dict, message: str) -> None:
    given = arguments(ROWS["ddim"], (2, 3)) | change
    with pytest.raises(InputError, match="sampler_step: " + message):
        ops.sampler_step(**given)
