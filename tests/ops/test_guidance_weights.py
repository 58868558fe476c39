"""guidance_weights: w' = f * w, with the perpendicular step and rescaling."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from backends import NATIVE, TARGETS, Target
from inputs import DTYPES, LAYOUTS, normal
from tolerance import assert_close_to_truth, relative_error
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.errors import InputError

SHAPES = [(2, 1), (1, 3), (3, 5), (1, 1023), (3, 3, 5, 7), (2, 4, 33, 32), (1, 70001)]
KINDS = {
    "rescaled": {"rescale": 0.7},
    "perpendicular": {"perpendicular": True},
    "both": {"rescale": 0.7, "perpendicular": True},
    "neither": {},
}
REFERENCE = Target("reference", "cpu")


def arguments(
    shape: tuple[int, ...], groups: int = 3, dtype: str = "float32", layout: str = "contiguous", mean: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(model_output, weights); the groups have much in common, as conditional and unconditional outputs do."""
    common = normal(*shape, seed=5, mean=mean).repeat(groups, *(1,) * (len(shape) - 1))
    outputs = (common + 0.3 * normal(groups * shape[0], *shape[1:], seed=6)).to(DTYPES[dtype])
    outputs = outputs.contiguous(memory_format=LAYOUTS[layout]) if len(shape) == 4 else outputs
    weights = torch.tensor([1.0, 7.5, -2.0, 1.5])[:groups] + 0.1 * normal(shape[0], groups, seed=7)
    return outputs, weights


def weigh(target: Target, model_output: Tensor, weights: Tensor, **options: Any) -> Tensor:
    with target.forced():
        return ops.guidance_weights(*target.move((model_output, weights)), **options).cpu()


def check(target: Target, model_output: Tensor, weights: Tensor, **options: Any) -> Tensor:
    actual = weigh(target, model_output, weights, **options)
    truth = weigh(REFERENCE, model_output.double(), weights.double(), **options)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    assert_close_to_truth(actual, truth, weigh(REFERENCE, model_output, weights, **options))
    return actual


@pytest.mark.parametrize("groups", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_kinds(target: Target, dtype: str, layout: str, kind: str, groups: int) -> None:
    check(target, *arguments((2, 6, 5, 7), groups, dtype, layout), **KINDS[kind])


@pytest.mark.parametrize("mean", [0.0, 100.0, -1e4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_shapes(target: Target, shape: tuple[int, ...], mean: float) -> None:
    check(target, *arguments(shape, mean=mean), **KINDS["both"])


@pytest.mark.parametrize("channels", [1, 3, 6])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_channels(target: Target, layout: str, channels: int) -> None:
    outputs, weights = arguments((2, 6, 33, 31), layout=layout)  # more than a block of any number of channels but one
    found = check(target, outputs, weights, channels=channels, **KINDS["both"])
    first = outputs[:, :channels].contiguous()
    assert_close_to_truth(found, weigh(REFERENCE, first.double(), weights.double(), **KINDS["both"]), found)
    poisoned = outputs.clone()
    poisoned[:, channels:] = torch.nan
    assert torch.equal(weigh(target, poisoned, weights, channels=channels, **KINDS["both"]), found)


@pytest.mark.parametrize("target", TARGETS)
def test_a_mean_ten_thousand_times_the_deviation(target: Target) -> None:
    """m itself in float32 would have lost four digits of its deviation."""
    outputs, weights = arguments((3, 5), mean=1e4)
    truth = weigh(REFERENCE, outputs.double(), weights.double(), rescale=0.7)
    assert relative_error(weigh(target, outputs, weights, rescale=0.7), truth) < 1e-5


def combined(weights: Tensor, outputs: Tensor) -> Tensor:
    """m = w_0 out_0 + sum of w_k (out_k - out_0), of outputs (G, N, count)."""
    w = weights.t()[..., None]
    return w[0] * outputs[0] + (w[1:] * (outputs[1:] - outputs[0])).sum(dim=0)


def test_the_reference_follows_the_papers() -> None:
    """The rescaled output as the paper forms it, and the perpendicular one from the perpendicular parts themselves."""
    model_output, weights = (value.double() for value in arguments((2, 6, 5, 7), 4))
    outputs = model_output.unflatten(0, (4, 2)).flatten(2)
    d = outputs[1:] - outputs[0]
    parts = [d[0]]
    for k in (1, 2):
        parts.append(d[k] - (d[k] * d[0]).sum(1, keepdim=True) / (d[0] * d[0]).sum(1, keepdim=True) * d[0])
        torch.testing.assert_close((parts[k] * d[0]).sum(1), torch.zeros(2).double(), rtol=0, atol=1e-12)
    m = weights[:, :1] * outputs[0] + sum(weights[:, k + 1 : k + 2] * parts[k] for k in range(3))
    found = weigh(REFERENCE, model_output, weights, perpendicular=True)
    torch.testing.assert_close(combined(found, outputs), m, rtol=1e-12, atol=1e-12)
    rescaled = m * outputs[1].std(dim=1, keepdim=True) / m.std(dim=1, keepdim=True)
    expected = 0.7 * rescaled + 0.3 * m
    found = weigh(REFERENCE, model_output, weights, perpendicular=True, rescale=0.7)
    torch.testing.assert_close(combined(found, outputs), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("target", [*TARGETS, REFERENCE], ids=str)
def test_constant_outputs_are_not_rescaled(target: Target) -> None:
    """0.1 is no binary number: sums of it are rounded, and a mean of them is not always it again."""
    outputs = torch.full((4, 3, 700), 0.1)
    outputs[2:] += 0.2
    weights = torch.tensor([[1.0, 7.5], [1.0, 3.0]])
    assert torch.equal(weigh(target, outputs, weights, rescale=0.7), weights)
    outputs[0] = normal(3, 700, seed=1)
    found = weigh(target, outputs, weights, rescale=0.5)  # out_1 alone is constant
    torch.testing.assert_close(found, torch.tensor([[0.5], [1.0]]) * weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", [*TARGETS, REFERENCE], ids=str)
def test_a_guidance_of_nothing_loses_nothing(target: Target) -> None:
    """d_1 = 0: the other groups keep all of theirs."""
    outputs, weights = arguments((2, 3, 5, 7))
    outputs[2:4] = outputs[:2]
    assert torch.equal(weigh(target, outputs, weights, perpendicular=True), weights)


@pytest.mark.parametrize("options", [{}, {"perpendicular": True}], ids=["plain", "perpendicular"])
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_to_do_gives_a_copy(target: Target, options: dict[str, bool]) -> None:
    outputs, weights = arguments((2, 3, 5, 7), groups=2)
    found = weigh(target, torch.full_like(outputs, torch.nan), weights, **options)
    assert torch.equal(found, weights)
    assert found.data_ptr() != weights.data_ptr()


@pytest.mark.parametrize("kind", ["rescaled", "both"])
@pytest.mark.parametrize("target", TARGETS)
def test_nan_stays_in_its_sample(target: Target, kind: str) -> None:
    outputs, weights = arguments((3, 3, 5, 7))
    outputs[4, 1, 2, 3] = torch.nan
    found = weigh(target, outputs, weights, **KINDS[kind]).isnan()
    assert found.all(dim=1).tolist() == found.any(dim=1).tolist() == [False, True, False]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", [*TARGETS, REFERENCE], ids=str)
def test_a_group_of_weight_zero_does_not_leak(target: Target, kind: str) -> None:
    outputs, weights = arguments((2, 3, 5, 7), 4)
    weights[:, 2] = 0.0
    found = weigh(target, outputs, weights, **KINDS[kind])
    outputs[4:6] = torch.nan
    assert torch.equal(weigh(target, outputs, weights, **KINDS[kind]), found)


@pytest.mark.parametrize("target", TARGETS)
def test_a_sample_does_not_depend_on_the_batch(target: Target) -> None:
    outputs, weights = arguments((3, 4, 17, 31))
    batch = weigh(target, outputs, weights, **KINDS["both"])
    for n in range(3):
        alone = weigh(target, outputs[[n, n + 3, n + 6]], weights[n : n + 1], **KINDS["both"])
        assert torch.equal(alone, batch[n : n + 1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_do_not_change_the_bits(many_threads: None, layout: str) -> None:
    outputs, weights = arguments((3, 8, 64, 65), layout=layout)
    results = []
    for threads, channels in itertools.product((1, 2, 3), (None, 4)):
        torch.set_num_threads(threads)
        results.append(weigh(NATIVE, outputs, weights, channels=channels, **KINDS["both"]))
    for left, right in zip(results[2:], results, strict=False):
        assert torch.equal(left, right)


def test_strided_inputs() -> None:
    outputs, weights = arguments((2, 3, 4, 6))
    strided = torch.stack([outputs] * 2, dim=-1)[..., 0]
    expected = weigh(NATIVE, outputs, weights, **KINDS["both"])
    assert torch.equal(weigh(NATIVE, strided, weights, **KINDS["both"]), expected)


@pytest.mark.parametrize("channels", [None, 2])
def test_opcheck(channels: int | None) -> None:
    outputs, weights = arguments((2, 3, 4, 5), dtype="bfloat16", layout="channels_last")
    torch.library.opcheck(torch.ops.fastdiff.guidance_weights.default, (outputs, weights, 0.7, True, channels))


def test_compiles_whole() -> None:
    def forward(outputs: Tensor, weights: Tensor) -> Tensor:
        return 2 * ops.guidance_weights(outputs, weights, rescale=0.7, perpendicular=True)

    operands = arguments((2, 3, 4, 5))
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")(*operands)
    assert torch.equal(compiled, forward(*operands))


def test_explained_and_differentiable() -> None:
    outputs, weights = arguments((2, 3, 4, 5))
    assert fastdiff.explain("guidance_weights", outputs, weights).startswith("guidance_weights: native")
    weights.requires_grad_()
    with pytest.raises(InputError, match="guidance_weights: an input requires grad"):
        weigh(NATIVE, outputs, weights)
    weigh(REFERENCE, outputs, weights, perpendicular=True).sum().backward()
    assert weights.grad[:, 0].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_output": torch.zeros(4, 3, dtype=torch.int64)}, r"model_output is torch.int64; expected float32"),
        ({"model_output": torch.zeros(4)}, r"model_output has shape \(4,\); expected \(G \* N, C, ...\) with at least"),
        ({"model_output": torch.zeros(4, 0)}, r"model_output has shape \(4, 0\); expected"),
        ({"model_output": torch.zeros(5, 3)}, r"weights has shape \(2, 2\), model_output 5 samples; expected \(N, G\)"),
        ({"weights": torch.ones(4, 1)}, r"weights has shape \(4, 1\), .* G at least 2"),
        ({"weights": torch.ones(4)}, r"weights has shape \(4,\), model_output 4 samples; expected \(N, G\)"),
        ({"weights": torch.ones(2, 2).t()[:, :1].expand(2, 2)}, r"weights is .* expected contiguous float32 \(2, 2\)"),
        ({"weights": torch.ones(2, 2).half()}, r"weights is torch.float16 of shape \(2, 2\); expected"),
        ({"weights": torch.ones(2, 2, device="meta")}, r"weights is on meta, the first tensor on cpu"),
        ({"rescale": 1.5}, r"rescale is 1.5; expected a number from 0 to 1"),
        ({"rescale": float("nan")}, r"rescale is nan; expected a number from 0 to 1"),
        ({"channels": 0}, r"channels is 0; expected 1 to 3, or None for all"),
        ({"channels": 4}, r"channels is 4; expected 1 to 3"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_errors(change: dict, message: str) -> None:
    given = {"model_output": torch.zeros(4, 3), "weights": torch.ones(2, 2), **change}
    with pytest.raises(InputError, match="guidance_weights: " + message):
        ops.guidance_weights(**given)
