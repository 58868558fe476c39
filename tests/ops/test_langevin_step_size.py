"""langevin_step_size: (inf, e, sqrt(2 e)) with e = 2 (snr |z| / |D|)^2."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from backends import NATIVE, TARGETS, Target
from inputs import DTYPES, LAYOUTS, normal
from noise_truth import normals_truth
from prediction_inputs import ROW, SEEDS, SHAPES, STATES, arguments, prediction, table, wide
from tolerance import assert_close_to_truth
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.noise import STREAM_STEP

SNR = 0.16


def step_size(target: Target, given: dict[str, Any], **options: Any) -> Tensor:
    with target.forced():
        return ops.langevin_step_size(**target.move({"snr": SNR, **given, **options})).cpu()


def check(target: Target, given: dict[str, Any]) -> None:
    exact = wide(given)
    if "seeds" in given:
        exact["noise"] = normals_truth(exact.pop("seeds"), given["x"].shape, ROW, STREAM_STEP)
    reference = Target("reference", "cpu")
    actual = step_size(target, given)
    assert actual.dtype == torch.float32
    assert_close_to_truth(actual, step_size(reference, exact), step_size(reference, given))


def with_noise(given: dict[str, Any], noise: str) -> dict[str, Any]:
    """The same with seeds ("drawn"), or with noise of a dtype."""
    shape = given["x"].shape
    if noise == "drawn":
        return given | {"seeds": SEEDS[: shape[0]]}
    return given | {"noise": normal(*shape, seed=8, dtype=DTYPES[noise])}


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize(("state", "model"), STATES)
@pytest.mark.parametrize("noise", ["drawn", *DTYPES])
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_dtypes(target: Target, noise: str, state: str, model: str, groups: int) -> None:
    check(target, with_noise(arguments((2, 3, 5, 7), state=state, model=model, groups=groups), noise))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variance", [False, True], ids=["own channels", "twice the channels"])
@pytest.mark.parametrize("noise", ["drawn", "float32"])
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_shapes(target: Target, noise: str, variance: bool, layout: str, shape: tuple[int, ...]) -> None:
    check(target, with_noise(arguments(shape, groups=2, model="bfloat16", layout=layout, variance=variance), noise))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_weights(target: Target, groups: int) -> None:
    check(target, with_noise(arguments((3, 4, 9, 5), groups=groups, weighted=True), "drawn"))


@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_large_means(target: Target) -> None:
    check(target, with_noise(arguments((2, 4, 33, 32), groups=2, mean=100.0), "float32"))


@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_many_tiles(target: Target) -> None:
    """More tiles than there are chunks to reduce them."""
    check(target, with_noise(arguments((1, 70001)), "float32"))


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_the_reference_follows_the_formula(groups: int) -> None:
    given = wide(with_noise(arguments((2, 3, 5, 7), groups=groups, variance=True), "float32"))
    norm_z, norm_d = (value.flatten(1).norm(dim=1) for value in (given["noise"], prediction(given)))
    e = 2 * (SNR * norm_z / norm_d) ** 2
    expected = torch.stack([torch.full_like(e, math.inf), e, torch.sqrt(2 * e)], dim=1)
    torch.testing.assert_close(step_size(Target("reference", "cpu"), given), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_drawn_noise_is_that_of_the_step(target: Target) -> None:
    given = arguments((3, 4, 17, 5))
    with target.forced():
        noise = ops.philox_normal(SEEDS.to(target.device), (3, 4, 17, 5), step=ROW, stream=STREAM_STEP).cpu()
    assert torch.equal(step_size(target, given | {"seeds": SEEDS}), step_size(target, given | {"noise": noise}))


@pytest.mark.parametrize("target", TARGETS)
def test_given_noise_counts_where_seeds_are_given_too(target: Target) -> None:
    given = with_noise(arguments((3, 4, 5)), "float32")
    assert torch.equal(step_size(target, given | {"seeds": SEEDS}), step_size(target, given))


@pytest.mark.parametrize("target", TARGETS)
def test_no_score_gives_no_step(target: Target) -> None:
    given = with_noise(arguments((2, 3, 5, 7)), "drawn")
    given["x"][1], given["model_output"][1] = 0.0, 0.0
    out = step_size(target, given)
    assert out[1].tolist() == [math.inf, 0.0, 0.0]
    assert (out[0, 1:] > 0.0).all()


@pytest.mark.parametrize("target", TARGETS)
def test_nan_gives_nan(target: Target) -> None:
    given = with_noise(arguments((3, 3, 5, 7)), "drawn")
    given["model_output"][1, 2, 4, 6] = math.nan
    assert step_size(target, given)[:, 1:].isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2]


@pytest.mark.parametrize("name", ["x", "model_output"])
@pytest.mark.parametrize("target", TARGETS)
def test_an_unread_input_does_not_leak(target: Target, name: str) -> None:
    given = with_noise(arguments((2, 3, 5, 7), groups=2), "drawn")
    given["table"] = table((0.0, 1.0) if name == "x" else (1.0, 0.0))
    given[name] = torch.full_like(given[name], math.nan)
    assert step_size(target, given)[:, 1:].isfinite().all()


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("target", [*TARGETS, Target("reference", "cpu")], ids=str)
def test_a_weight_of_zero(target: Target, k: int) -> None:
    """The group's distance to the first counts for nothing, whatever it is; without w_0 that first one still counts."""
    given = with_noise(arguments((2, 3, 5, 7), groups=4), "drawn")
    given["weights"][:, k] = 0.0
    if k > 0:
        given["model_output"][2 * k : 2 * k + 2] = math.nan
    exact = wide(given)
    if k > 0:
        exact["model_output"][2 * k : 2 * k + 2] = 0.0
    truth = step_size(Target("reference", "cpu"), exact)
    torch.testing.assert_close(step_size(target, given).double(), truth, rtol=1e-6, atol=0)


@pytest.mark.parametrize("target", TARGETS)
def test_the_counter_is_added_to_the_row(target: Target) -> None:
    given = with_noise(arguments((2, 3, 5, 7)), "drawn")
    moved = step_size(target, {**given, "row": 1, "counter": torch.tensor([ROW - 1])})
    assert torch.equal(moved, step_size(target, given))


@pytest.mark.parametrize("counter", [2, -3])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_counter_outside_the_table_is_an_error(backend: str, counter: int) -> None:
    given = with_noise(arguments((2, 3)), "drawn") | {"counter": torch.tensor([counter])}
    message = rf"langevin_step_size: row \+ counter = {ROW + counter} is outside the table's 4 rows"
    with pytest.raises(InputError, match=message):
        step_size(Target(backend, "cpu"), given)


@pytest.mark.parametrize("counter", [2, -3])
@pytest.mark.parametrize("target", TARGETS[1:])
def test_a_counter_outside_the_table_gives_nan_on_a_gpu(target: Target, counter: int) -> None:
    given = with_noise(arguments((2, 3)), "drawn") | {"counter": torch.tensor([counter])}
    assert step_size(target, given)[:, 1:].isnan().all()


@pytest.mark.parametrize("noise", ["drawn", "float32"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_sample_does_not_depend_on_the_batch(target: Target, noise: str) -> None:
    given = with_noise(arguments((3, 4, 17, 5), groups=2), noise)
    batch = step_size(target, given)
    for n in range(3):
        one = {name: value[n : n + 1] if name in ("x", "seeds", "noise") else value for name, value in given.items()}
        one["model_output"] = given["model_output"][[n, n + 3]]
        assert torch.equal(step_size(target, one), batch[n : n + 1])


@pytest.mark.parametrize("noise", ["drawn", "float32"])
def test_threads_do_not_change_the_bits(many_threads: None, noise: str) -> None:
    given = with_noise(arguments((2, 8, 64, 65), groups=2, model="bfloat16"), noise)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(step_size(NATIVE, given))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_strided_inputs() -> None:
    given = with_noise(arguments((2, 3, 4, 6), groups=2), "float32")
    expected = step_size(NATIVE, given)
    for name in ("x", "model_output", "noise"):
        given[name] = torch.stack([given[name]] * 2, dim=-1)[..., 0]
    assert torch.equal(step_size(NATIVE, given), expected)


def test_double_noise_is_left_to_the_reference() -> None:
    given = with_noise(arguments((2, 3)), "float32")
    given["noise"] = given["noise"].double()
    reason = fastdiff.explain("langevin_step_size", **given, snr=SNR)
    assert "not native: it takes noise in float32, float16 and bfloat16, not float64" in reason


@pytest.mark.parametrize("noise", ["drawn", "bfloat16"])
def test_opcheck(noise: str) -> None:
    given = arguments((2, 3, 4, 5), groups=2, weighted=True, model="bfloat16", layout="channels_last")
    given = with_noise(given, noise)
    names = ("x", "model_output", "table", "row", "counter", "weights", "noise", "seeds")
    flat = [given.get(name) for name in names]
    torch.library.opcheck(torch.ops.fastdiff.langevin_step_size.default, (*flat, SNR))


def test_compiles_whole() -> None:
    given = arguments((2, 3, 4, 5), groups=2)

    def forward(x: Tensor, m: Tensor, rows: Tensor, seeds: Tensor) -> Tensor:
        return 2 * ops.langevin_step_size(x, m, rows, ROW, snr=SNR, seeds=seeds)

    operands = (given["x"], given["model_output"], given["table"], SEEDS[:2])
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")(*operands)
    assert torch.equal(compiled, forward(*operands))


def test_gradients_through_the_reference() -> None:
    given = with_noise(arguments((2, 3)), "drawn")
    m = given["model_output"].requires_grad_()
    with pytest.raises(InputError, match="langevin_step_size: an input requires grad"):
        step_size(NATIVE, given)
    step_size(Target("reference", "cpu"), given)[:, 1].sum().backward()
    assert m.grad.abs().min() > 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": None}, r"expected noise or seeds, got neither; pass what sampler_step is given"),
        ({"noise": torch.zeros(2)}, r"noise has shape \(2,\); expected \(2, 3\)"),
        ({"noise": torch.zeros(2, 3, dtype=torch.int32)}, r"noise is torch.int32; expected float32"),
        ({"noise": torch.zeros(2, 3, device="meta")}, r"noise is on meta, the first tensor on cpu"),
        ({"seeds": torch.tensor([1])}, r"seeds is torch.int64 of shape \(1,\); expected int64 \(2,\), one per sample"),
        ({"snr": 0.0}, r"snr is 0.0; expected a positive finite number"),
        ({"snr": math.inf}, r"snr is inf; expected a positive finite number"),
        ({"x": torch.tensor(1.0)}, r"x has shape \(\); expected \(N, ...\) with at least one element"),
        ({"model_output": torch.zeros(6, 3)}, r"model_output has 3 groups of 2 samples .* pass weights \(2, 3\)"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_errors(change: dict, message: str) -> None:
    given = {**arguments((2, 3)), "seeds": SEEDS[:2], "snr": SNR, **change}
    with pytest.raises(InputError, match="langevin_step_size: " + message):
        ops.langevin_step_size(**given)
