"""sampler_step as PyTorch sees it: its schema, compilation, gradients, fake tensors, and the arguments it refuses."""

from __future__ import annotations

import pytest
import torch
from backends import NATIVE, Target
from step_rows import ROW, ROWS, arguments, step
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.errors import InputError

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
