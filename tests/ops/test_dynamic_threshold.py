"""dynamic_threshold: (s, b/s, 1) with s a clamped quantile of |D|."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from backends import NATIVE, TARGETS, Target
from inputs import LAYOUTS, normal
from prediction_inputs import ROW, SHAPES, STATES, arguments, prediction, table, wide
from tolerance import assert_close_to_truth
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.errors import InputError

IDENTITY = table((1.0, 0.0), clip=1e-6)


def threshold(target: Target, given: dict[str, Any], percentile: float = 0.995, **options: Any) -> Tensor:
    with target.forced():
        return ops.dynamic_threshold(**target.move({**given, **options}), percentile=percentile).cpu()


def check(target: Target, given: dict[str, Any], percentile: float = 0.995, **options: Any) -> Tensor:
    actual = threshold(target, given, percentile, **options)
    reference = Target("reference", "cpu")
    truth = threshold(reference, wide(given), percentile, **options)
    assert actual.dtype == torch.float32
    assert_close_to_truth(actual, truth, threshold(reference, given, percentile, **options))
    return actual


def quantile(target: Target, values: Tensor, percentile: float) -> Tensor:
    """Of |values|, by an operator whose D is x and whose clip counts for nothing."""
    given = {"x": values, "model_output": torch.full_like(values, math.nan), "table": IDENTITY, "row": ROW}
    return threshold(target, given, percentile)[:, 0]


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(("state", "model"), STATES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_dtypes(target: Target, state: str, model: str, groups: int) -> None:
    check(target, arguments((2, 3, 5, 7), state=state, model=model, groups=groups), 0.9)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variance", [False, True], ids=["own channels", "twice the channels"])
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_shapes(target: Target, variance: bool, layout: str, shape: tuple[int, ...]) -> None:
    check(target, arguments(shape, groups=2, model="bfloat16", layout=layout, variance=variance))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_weights(target: Target, groups: int) -> None:
    check(target, arguments((3, 4, 9, 5), groups=groups, weighted=True))


@pytest.mark.parametrize("percentile", [0.0, 0.3, 0.5, 0.995, 1.0])
@pytest.mark.parametrize("count", [1, 2, 3, 100, 1023, 4097])
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_quantiles(target: Target, count: int, percentile: float) -> None:
    """The definition of torch.quantile, and of NumPy's."""
    values = normal(2, count, seed=count)
    exact = torch.quantile(values.double().abs(), percentile, dim=1)
    assert np.allclose(exact, np.quantile(values.double().abs().numpy(), percentile, axis=1), rtol=1e-12)
    plain = torch.quantile(values.abs(), percentile, dim=1)
    assert_close_to_truth(quantile(target, values, percentile), exact, plain)


@pytest.mark.parametrize("percentile", [0.0, 0.4, 0.6, 1.0])
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_duplicates(target: Target, percentile: float) -> None:
    """Few values, many times; all of one value; neighbours that differ in the last bit; zeros and subnormals."""
    few = torch.tensor([3.0, -1.0, 2.0, 0.5]).repeat(250)
    near = torch.nextafter(torch.ones(1000), torch.full((1000,), 2.0)).where(torch.arange(1000) % 2 == 0, 1.0)
    tiny = torch.arange(1000) * 1e-6
    values = torch.stack([few, torch.full_like(few, -7.0), near, tiny])
    exact = torch.quantile(values.double().abs(), percentile, dim=1).clamp(min=float(torch.tensor(1e-6)))
    assert_close_to_truth(quantile(target, values, percentile), exact, exact.float())


def test_truth_beyond_torchs_limit() -> None:
    """More than the 2^24 elements that torch.quantile takes."""
    values = torch.arange(2**24 + 3, dtype=torch.float32)[None] % 65521
    expected = values.sort(dim=1).values.double()
    rank = 0.995 * (values.shape[1] - 1)
    low = math.floor(rank)
    exact = expected[:, low] + (rank - low) * (expected[:, low + 1] - expected[:, low])
    assert_close_to_truth(quantile(NATIVE, values, 0.995), exact, exact.float())


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_the_reference_follows_the_formula(groups: int) -> None:
    given = wide(arguments((2, 3, 5, 7), groups=groups, variance=True))
    s = torch.quantile(prediction(given).abs().flatten(1), 0.9, dim=1).clamp(1.0, 2.0)
    expected = torch.stack([s, 1.0 / s, torch.ones_like(s)], dim=1)
    out = threshold(Target("reference", "cpu"), given, 0.9, maximum=2.0)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_the_bounds(target: Target) -> None:
    given = arguments((2, 3, 5, 7))
    given["x"][1] *= 100.0
    given["model_output"][0] *= 0.001
    given["x"][0] *= 0.001
    out = threshold(target, given, maximum=5.0)
    assert out.tolist() == [[1.0, 1.0, 1.0], [5.0, pytest.approx(0.2, rel=1e-7), 1.0]]
    assert float(threshold(target, given)[1, 0]) > 5.0


@pytest.mark.parametrize("name", ["x", "model_output"])
@pytest.mark.parametrize("target", TARGETS)
def test_an_unread_input_does_not_leak(target: Target, name: str) -> None:
    given = arguments((2, 3, 5, 7), groups=2) | {"table": table((0.0, 1.0) if name == "x" else (1.0, 0.0))}
    given[name] = torch.full_like(given[name], math.nan)
    assert threshold(target, given).isfinite().all()


@pytest.mark.parametrize("percentile", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("target", TARGETS)
def test_nan_gives_nan(target: Target, percentile: float) -> None:
    given = arguments((3, 3, 5, 7))
    given["model_output"][1, 2, 4, 6] = math.nan
    out = threshold(target, given, percentile)
    assert out[:, :2].isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


@pytest.mark.parametrize("target", [*TARGETS, Target("reference", "cpu")], ids=str)
def test_infinite_values_are_the_largest(target: Target) -> None:
    values = normal(1, 100, seed=1)
    values[0, [7, 30]] = math.inf
    assert quantile(target, values, 97 / 99) == values.abs().sort().values[0, 97]
    for percentile in (97.5 / 99, 98.5 / 99, 1.0):
        assert quantile(target, values, percentile).isinf().all()


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("target", [*TARGETS, Target("reference", "cpu")], ids=str)
def test_a_weight_of_zero(target: Target, k: int) -> None:
    """The group's distance to the first counts for nothing, whatever it is; without w_0 that first one still counts."""
    given = arguments((2, 3, 5, 7), groups=4)
    given["weights"][:, k] = 0.0
    if k > 0:
        given["model_output"][2 * k : 2 * k + 2] = math.nan
    exact = wide(given)
    if k > 0:
        exact["model_output"][2 * k : 2 * k + 2] = 0.0
    truth = threshold(Target("reference", "cpu"), exact)
    torch.testing.assert_close(threshold(target, given).double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_the_counter_is_added_to_the_row(target: Target) -> None:
    given = arguments((2, 3, 5, 7))
    moved = threshold(target, {**given, "row": 1, "counter": torch.tensor([ROW - 1])})
    assert torch.equal(moved, threshold(target, given))


@pytest.mark.parametrize("clip", [math.inf, 0.0, -1.0, math.nan])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_row_without_a_clip_is_an_error(backend: str, clip: float) -> None:
    given = arguments((2, 3)) | {"table": table(clip=clip)}
    with pytest.raises(InputError, match=rf"row {ROW} clips D at -?\w+\.?0?; expected a positive finite clip"):
        threshold(Target(backend, "cpu"), given)


@pytest.mark.parametrize("clip", [math.inf, 0.0])
@pytest.mark.parametrize("target", TARGETS[1:])
def test_a_row_without_a_clip_gives_nan_on_a_gpu(target: Target, clip: float) -> None:
    assert threshold(target, arguments((2, 3)) | {"table": table(clip=clip)})[:, 0].isnan().all()


@pytest.mark.parametrize("counter", [2, -3])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_counter_outside_the_table_is_an_error(backend: str, counter: int) -> None:
    given = arguments((2, 3)) | {"counter": torch.tensor([counter])}
    with pytest.raises(InputError, match=rf"row \+ counter = {ROW + counter} is outside the table's 4 rows"):
        threshold(Target(backend, "cpu"), given)


@pytest.mark.parametrize("counter", [2, -3])
@pytest.mark.parametrize("target", TARGETS[1:])
def test_a_counter_outside_the_table_gives_nan_on_a_gpu(target: Target, counter: int) -> None:
    assert threshold(target, arguments((2, 3)) | {"counter": torch.tensor([counter])})[:, 0].isnan().all()


@pytest.mark.parametrize("target", TARGETS)
def test_a_sample_does_not_depend_on_the_batch(target: Target) -> None:
    given = arguments((3, 4, 17, 5), groups=2, weighted=True)
    batch = threshold(target, given)
    for n in range(3):
        one = {**given, "x": given["x"][n : n + 1], "model_output": given["model_output"][[n, n + 3]]}
        one["weights"] = given["weights"][n : n + 1]
        assert torch.equal(threshold(target, one), batch[n : n + 1])


@pytest.mark.parametrize("samples", [1, 3])
def test_threads_do_not_change_the_bits(many_threads: None, samples: int) -> None:
    given = arguments((samples, 8, 64, 65), groups=2, model="bfloat16")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(threshold(NATIVE, given))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("place", [0, 20_000, 49_999])
def test_the_next_value_is_another_threads(many_threads: None, place: int) -> None:
    """Between the two largest values, of which one thread has one and perhaps another the other."""
    torch.set_num_threads(3)
    values = torch.ones(1, 50_000)
    values[0, place], values[0, 30_000] = 100.0, 10.0
    exact = torch.tensor([55.0], dtype=torch.float64)
    assert_close_to_truth(quantile(NATIVE, values, 49_998.5 / 49_999), exact, exact.float())


def test_strided_inputs() -> None:
    given = arguments((2, 3, 4, 6), groups=2)
    expected = threshold(NATIVE, given)
    for name in ("x", "model_output"):
        given[name] = torch.stack([given[name]] * 2, dim=-1)[..., 0]
    assert torch.equal(threshold(NATIVE, given), expected)


@pytest.mark.parametrize("weighted", [False, True], ids=["guidance", "weights"])
def test_opcheck(weighted: bool) -> None:
    given = arguments((2, 3, 4, 5), groups=2, weighted=weighted, model="bfloat16", layout="channels_last")
    flat = [given.get(name) for name in ("x", "model_output", "table", "row", "counter", "weights")]
    torch.library.opcheck(torch.ops.fastdiff.dynamic_threshold.default, (*flat, 0.9, 2.0))


def test_compiles_whole() -> None:
    given = arguments((2, 3, 4, 5), groups=3)

    def forward(x: Tensor, m: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        return 2 * ops.dynamic_threshold(x, m, rows, ROW, percentile=0.9, weights=weights)

    operands = (given["x"], given["model_output"], given["table"], given["weights"])
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")(*operands)
    assert torch.equal(compiled, forward(*operands))


def test_explained_and_differentiable() -> None:
    given = arguments((2, 3))
    assert fastdiff.explain("dynamic_threshold", **given, percentile=0.5).startswith("dynamic_threshold: native")
    m = given["model_output"].requires_grad_()
    with pytest.raises(InputError, match="dynamic_threshold: an input requires grad"):
        threshold(NATIVE, given)
    threshold(Target("reference", "cpu"), given, 1.0)[:, 0].sum().backward()
    assert m.grad.abs().max() == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, r"x is torch.int64; expected float32"),
        ({"x": torch.zeros(0, 3)}, r"x has shape \(0, 3\); expected \(N, ...\) with at least one element"),
        ({"model_output": torch.zeros(2, 3, dtype=torch.int32)}, r"model_output is torch.int32; expected float32"),
        ({"model_output": torch.zeros(3, 3)}, r"model_output has shape \(3, 3\); expected \(2, 3\), or \(4, 3\)"),
        ({"model_output": torch.zeros(2, 4)}, r"model_output has shape \(2, 4\); expected .* twice as many"),
        ({"model_output": torch.zeros(2, 3, 1)}, r"model_output has shape \(2, 3, 1\)"),
        ({"model_output": torch.zeros(2, 3, device="meta")}, r"model_output is on meta, the first tensor on cpu"),
        ({"model_output": torch.zeros(6, 3)}, r"model_output has 3 groups of 2 samples .* pass weights \(2, 3\)"),
        ({"weights": torch.ones(2, 2)}, r"weights is .* \(2, 2\); expected contiguous float32 \(2, 1\): one weight"),
        ({"weights": torch.ones(2, 1, dtype=torch.float64)}, r"weights is torch.float64 of shape \(2, 1\); expected"),
        ({"weights": torch.ones(2)}, r"weights is torch.float32 of shape \(2,\); expected contiguous float32 \(2, 1\)"),
        ({"table": torch.zeros(4, 31)}, r"table is torch.float32 of shape \(4, 31\); expected contiguous float32"),
        ({"row": 4}, r"row 4 is outside the table's 4 rows"),
        ({"counter": torch.tensor([1.0])}, r"counter is torch.float32 of 1 elements; expected int64 \(1,\)"),
        ({"percentile": 1.5}, r"percentile is 1.5; expected a number from 0 to 1"),
        ({"percentile": math.nan}, r"percentile is nan; expected a number from 0 to 1"),
        ({"maximum": 0.0}, r"maximum is 0.0; expected a positive number"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_errors(change: dict, message: str) -> None:
    with pytest.raises(InputError, match="dynamic_threshold: " + message):
        ops.dynamic_threshold(**{**arguments((2, 3)), "percentile": 0.9, **change})
