"""sampler_step as PyTorch sees it: its schema, compilation, gradients, fake tensors, and the arguments it refuses."""

from __future__ import annotations

import pytest
import torch
from backends import NATIVE, Target
from step_rows import FEATURES, ROW, ROWS, arguments, extended, step
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.ops import native

OPTIONAL = ("counter", "anchor", "hist1", "hist2", "hist3", "noise", "seeds", "weights", "scales")
OPTIONAL += ("known", "known_noise", "mask")


@pytest.mark.parametrize("name", ["ddim", "everything"])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_opcheck(name: str, guided: bool) -> None:
    given = arguments(ROWS[name], (2, 3, 4, 5), guided=guided, model="bfloat16", layout="channels_last")
    given |= {f"hist{i + 1}": h for i, h in enumerate(given["history"])}
    flat = [given[key] for key in ("x", "model_output", "table", "row")] + [given.get(key) for key in OPTIONAL]
    flat += [given["new_history"], given["new_anchor"], None, given["model_input"] if guided else None]
    torch.library.opcheck(torch.ops.fastdiff.sampler_step.default, tuple(flat))


@pytest.mark.parametrize("copies", [None, 1])
@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
def test_opcheck_of_all_features(drawn: bool, copies: int | None) -> None:
    given = arguments(ROWS["dpmpp_2m_sde"], (2, 3, 4, 5), model="bfloat16", drawn=drawn)
    given = extended(given, *FEATURES, groups=3, drawn=drawn, layout="channels_last")
    flat = [given[key] for key in ("x", "model_output", "table", "row")]
    flat += [given["history"][0] if key == "hist1" else given.get(key) for key in OPTIONAL]
    flat += [True, False, copies, torch.bfloat16]
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


def test_compiles_whole_with_all_features() -> None:
    given = extended(arguments(ROWS["everything"], (2, 3, 4, 5)), *FEATURES, groups=3) | {"copies": 1}
    operands = {key: given.pop(key) for key in ("x", "model_output", "weights", "scales", "known", "mask")}

    def forward(values: dict[str, Tensor]) -> tuple[Tensor | None, ...]:
        return tuple(ops.sampler_step(**values, **given))

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")(operands)
    for left, right in zip(compiled, forward(operands), strict=True):
        assert torch.equal(left, right)


def test_gradients_of_all_features_through_the_reference() -> None:
    """Where the mask and the weights leave something out, nothing comes back, not even NaN."""
    given = extended(arguments(ROWS["euler_ancestral"], (2, 3, 4, 5), drawn=False), *FEATURES, groups=3, drawn=False)
    given["mask"][0], given["weights"][1, 2] = 0.0, 0.0
    m = given["model_output"].requires_grad_()
    step(Target("reference", "cpu"), given).x.sum().backward()
    assert m.grad.isfinite().all()
    assert (m.grad[0::2] == 0.0).all()
    assert (m.grad[5, :3] == 0.0).all()
    assert (m.grad[5, 3:] != 0.0).any()


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


@pytest.mark.parametrize("name", ROWS)
def test_a_plain_call_is_the_same_by_the_short_way(name: str) -> None:
    given = arguments(ROWS[name], (2, 3, 5, 7), drawn=False) | {"model_input": None}
    fastdiff.report(reset=True)
    short = ops.sampler_step(**given)
    assert native.take_plain_steps() == 1
    with torch.profiler.profile():
        long = ops.sampler_step(**given)
    assert native.take_plain_steps() == 0
    for ours, theirs in zip(short, long, strict=True):
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)


def test_the_short_way_is_not_taken_where_something_else_was_demanded() -> None:
    given = arguments(ROWS["ddim"], (2, 3)) | {"model_input": None}
    ops.sampler_step(**given)
    native.take_plain_steps()
    with fastdiff.use_backend("sampler_step=reference"), fastdiff.use_backend("attention=triton"):
        ops.sampler_step(**given)
    with pytest.raises(InputError, match="backend"), fastdiff.use_backend("sampler_step=cuda"):
        pass
    assert native.take_plain_steps() == 0
    with fastdiff.use_backend("native"):
        ops.sampler_step(**given)
    assert native.take_plain_steps() == 1


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": None}, r"model_output has 3 groups of 2 samples and there are no weights; pass weights \(2, 3\)"),
        ({"weights": torch.ones(2, 2)}, r"weights is torch.float32 of shape \(2, 2\); expected .* float32 \(2, 3\)"),
        (
            {"weights": torch.ones(2, 3).double()},
            r"weights is torch.float64 of shape \(2, 3\); expected contiguous float",
        ),
        (
            {"weights": torch.ones(3, 2).t()},
            r"weights is .*; expected contiguous float32 \(2, 3\): one weight for each",
        ),
        ({"weights": torch.ones(2, 3, device="meta")}, r"weights is on meta, the first tensor on cpu"),
        ({"model_output": torch.ones(6, 4, 4, 5)}, r"model_output has shape \(6, 4, 4, 5\); .* or twice as many"),
        ({"model_output": torch.ones(6, 3, 4, 4)}, r"model_output has shape \(6, 3, 4, 4\); expected \(2, 3, 4, 5\)"),
        ({"model_output": torch.ones(5, 6, 4, 5)}, r"model_output has shape \(5, 6, 4, 5\); expected \(2, 3, 4, 5\)"),
        ({"model_output": torch.ones(0, 3, 4, 5)}, r"model_output has shape \(0, 3, 4, 5\); expected \(2, 3, 4, 5\)"),
        ({"scales": torch.ones(2, 2)}, r"scales is .* \(2, 2\); expected contiguous float32 \(2, 3\): bound, data"),
        ({"known": None}, r"known and mask come together; pass known, or neither of them nor known_noise"),
        ({"mask": None}, r"known and mask come together; pass mask, or neither of them nor known_noise"),
        ({"known": None, "mask": None}, r"known and mask come together; pass known, or neither"),
        ({"known": torch.ones(2, 3, 4, 4)}, r"known has shape \(2, 3, 4, 4\); expected \(2, 3, 4, 5\)"),
        ({"known": torch.ones(2, 3, 4, 5).double()}, r"known is float64, x is torch.float32; convert one of them"),
        ({"known": torch.ones(2, 3, 4, 5).int()}, r"known is torch.int32; expected float32"),
        ({"known_noise": torch.ones(2, 3, 4, 4)}, r"known_noise has shape \(2, 3, 4, 4\); expected \(2, 3, 4, 5\)"),
        ({"mask": torch.ones(4, 5)}, r"mask has shape \(4, 5\); expected \(1 or 2, 1 or 3, 4, 5\)"),
        ({"mask": torch.ones(2, 3, 4, 1)}, r"mask has shape \(2, 3, 4, 1\); expected \(1 or 2, 1 or 3, 4, 5\)"),
        ({"mask": torch.ones(1, 2, 4, 5)}, r"mask has shape \(1, 2, 4, 5\); expected \(1 or 2, 1 or 3, 4, 5\)"),
        ({"mask": torch.ones(1, 1, 4, 5).bool()}, r"mask is torch.bool; expected float32, 1 where the sample is made"),
        ({"mask": torch.ones(1, 1, 4, 5, device="meta")}, r"mask is on meta, the first tensor on cpu"),
        ({"noise": torch.ones(2, 3, 4, 5).double()}, r"noise is float64, x is torch.float32; convert one of them"),
        ({"copies": 0}, r"copies is 0; expected at least 1, or None for the groups of model_output"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_errors_of_features(change: dict, message: str) -> None:
    given = extended(arguments(ROWS["ddim"], (2, 3, 4, 5)), *FEATURES, groups=3, drawn=False) | change
    with pytest.raises(InputError, match="sampler_step: " + message):
        ops.sampler_step(**given)
