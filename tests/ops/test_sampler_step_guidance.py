"""sampler_step with weights for its groups, variance channels, and scales of each sample."""

from __future__ import annotations

import math

import pytest
import torch
from backends import NATIVE, TARGETS, Target
from inputs import LAYOUTS, normal
from step_rows import EVERYWHERE, FEATURES, REFERENCE, ROW, ROWS, arguments, check, extended, step, table, truth
from torch import Tensor

from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.ops.row import KNOWN, VARIANCE

SETS = {name: (name,) for name in FEATURES} | {"all": FEATURES}
SHAPES = [(2, 1), (3, 5), (1, 3, 341), (3, 3, 5, 7), (2, 4, 33, 32)]
STATES = [("float32", "float16"), ("float32", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32")]


def everything(shape: tuple[int, ...] = (2, 3, 5, 7), state: str = "float32", model: str = "float32") -> dict:
    return arguments(ROWS["everything"], shape, state=state, model=model)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("features", SETS)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_features(target: Target, features: str, layout: str) -> None:
    check(target, extended(everything(), *SETS[features], layout=layout))


@pytest.mark.parametrize("groups", [1, 2, 3, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_groups(target: Target, layout: str, groups: int) -> None:
    given = everything((3, 4, 5, 6), model="bfloat16")
    check(target, extended(given, "weights", "variance", groups=groups, layout=layout))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_all_shapes(target: Target, shape: tuple[int, ...]) -> None:
    check(target, extended(everything(shape), *FEATURES, groups=3))


@pytest.mark.parametrize(("state", "model"), STATES)
@pytest.mark.parametrize("drawn", [False, True], ids=["given", "drawn"])
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_all_dtypes(target: Target, drawn: bool, state: str, model: str) -> None:
    given = arguments(ROWS["everything"], (2, 3, 5, 7), state=state, model=model, drawn=drawn)
    check(target, extended(given, *FEATURES, drawn=drawn))


def exponential(target: Target, exponents: Tensor) -> Tensor:
    """exp of each, as the factor of a noise of ones."""
    zeros, rows = torch.zeros_like(exponents), table({"noise": 1.0})
    rows[ROW, VARIANCE] = 1.0
    given = {"x": zeros[None, None], "model_output": torch.stack([zeros, exponents])[None], "table": rows, "row": ROW}
    return step(target, {**given, "noise": torch.ones_like(given["x"])}).x[0, 0]


@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_the_exponential(target: Target) -> None:
    """The rule of the tolerance for each element by itself, over all that float32 holds."""
    exponents = torch.linspace(-87.0, 88.5, 4099)
    exact = exponents.double().exp()
    errors = [
        float(((e.double() - exact) / exact).abs().max()) for e in (exponential(target, exponents), exponents.exp())
    ]
    assert errors[0] <= 2.0 * errors[1] + torch.finfo(torch.float32).eps
    ends = torch.tensor([-1e30, -200.0, 0.0, 89.0, 1e30, math.nan])
    assert torch.equal(
        exponential(target, ends).nan_to_num(7.0), torch.tensor([0.0, 0.0, 1.0, *[3.4028235e38] * 2, 7.0])
    )


def test_the_formulas() -> None:
    """The specification against the formulas written out."""
    given = truth_inputs(extended(everything(), "weights", "variance", "scales", groups=3))
    out0, out1, out2 = given["model_output"][:, :3].chunk(3)
    w0, w1, w2 = (column.double().view(2, 1, 1, 1) for column in given["weights"].unbind(1))
    bound, data_factor, noise_factor = (column.double().view(2, 1, 1, 1) for column in given["scales"].unbind(1))
    c = given["table"][ROW].double()
    m = w0 * out0 + w1 * (out1 - out0) + w2 * (out2 - out0)
    data = data_factor * torch.minimum(torch.maximum(c[1] * given["x"] + c[2] * m, -bound), bound)
    noise = given["noise"] * noise_factor * torch.exp(c[VARIANCE] * given["model_output"][4:, 3:])
    inputs = (given["x"], m, data, given["anchor"], *given["history"], noise)
    expected = sum(c[4 + i] * value for i, value in enumerate(inputs))
    torch.testing.assert_close(step(REFERENCE, given).x, expected, rtol=1e-12, atol=1e-12)


def truth_inputs(given: dict) -> dict:
    """The same in float64 with noise given."""
    wide = {n: v.double() if n in ("x", "model_output", "anchor") else v for n, v in given.items() if n != "seeds"}
    return wide | {"history": tuple(h.double() for h in given["history"]), "noise": normal(2, 3, 5, 7).double()}


def test_float64_takes_its_scales_and_weights_in_float64_too() -> None:
    """As `dynamic_threshold` and `guidance_weights` give them there."""
    given = truth_inputs(extended(everything(), "weights", "scales", groups=3))
    doubled = given | {name: given[name].double() for name in ("weights", "scales")}
    assert torch.equal(step(REFERENCE, doubled).x, step(REFERENCE, given).x)


def test_without_weights_the_row_guides() -> None:
    given = extended(everything(), groups=2)
    weighted = truth(given | {"weights": torch.tensor([[1.0, 2.5]] * 2)})
    torch.testing.assert_close(weighted.x, truth(given).x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", [0, 1, 2])
@pytest.mark.parametrize("target", EVERYWHERE)
def test_a_weight_of_zero_reads_nothing(target: Target, group: int) -> None:
    """NaN in a group reaches the sample whose weight for it is not zero, and no other."""
    given = extended(everything(), "weights", groups=3)
    given["model_output"][2 * group : 2 * group + 2] = math.nan
    given["weights"][0] = torch.eye(3)[0] if group else torch.zeros(3)
    given["weights"][1] = 0.5
    out = step(target, given)
    assert out.x[0].isfinite().all()
    assert out.x[1].isnan().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", EVERYWHERE)
def test_only_the_last_group_says_the_variance(target: Target, layout: str) -> None:
    given = extended(everything(), "variance", groups=2, layout=layout)
    given["model_output"][:2, 3:] = math.nan
    assert check(target, given).x.isfinite().all()
    given["model_output"][2:, 3:] = math.nan
    assert step(target, given).x.isnan().all()


@pytest.mark.parametrize("row", ["ddim", "euler_ancestral"])
@pytest.mark.parametrize("target", EVERYWHERE)
def test_a_variance_that_does_not_count_is_not_read(target: Target, row: str) -> None:
    """A row without noise, and a row without the variance's coefficient."""
    given = extended(arguments(ROWS[row], (2, 3, 5, 7)), "variance")
    given["table"][ROW, VARIANCE] = 0.4 if row == "ddim" else 0.0
    given["model_output"][:, 3:] = math.nan
    assert step(target, given).x.isfinite().all()


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_missing_variance_is_an_error(backend: str) -> None:
    given = everything((2, 3))
    given["table"] = given["table"].clone()
    given["table"][ROW, VARIANCE] = 0.4
    message = "row 3 of the table uses variance, which was not given; pass a model_output with twice the channels of x$"
    with pytest.raises(InputError, match=message):
        step(Target(backend, "cpu"), given)


@pytest.mark.parametrize("features", [(), ("weights", "scales", "kept")], ids=["plain", "more"])
@pytest.mark.parametrize("target", TARGETS[1:])
def test_a_missing_variance_gives_nan_on_a_gpu(target: Target, features: tuple[str, ...]) -> None:
    given = extended(arguments(ROWS["only_noise"], (2, 3)), *features)
    given["table"][ROW, VARIANCE] = 0.4
    if "mask" in given:
        given["mask"] = torch.ones(2, 3)
    assert step(target, given).x.isnan().all()


@pytest.mark.parametrize("target", EVERYWHERE)
def test_scales_take_the_place_of_the_clip(target: Target) -> None:
    rows = table({"D": 1.0}, clip=0.1)
    given = arguments(rows, (2, 4000)) | {"scales": torch.tensor([[0.5, 3.0, 1.0], [math.inf, 1.0, 1.0]])}
    out = step(target, given).x
    assert float(out[0].abs().max()) == 1.5
    assert float(out[1].abs().max()) > 2.0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_sample_does_not_depend_on_the_batch(target: Target, layout: str) -> None:
    given = extended(everything((3, 4, 17, 5)), *FEATURES, groups=3, layout=layout)
    batch = step(target, given)
    for n in range(3):
        one = {name: value[n : n + 1] if isinstance(value, Tensor) else value for name, value in given.items()}
        one |= {"table": given["table"], "model_output": given["model_output"][[n, n + 3, n + 6]]}
        one["history"] = tuple(h[n : n + 1] for h in given["history"])
        alone = step(target, one)
        for left, right in zip(alone[:3], batch[:3], strict=True):
            assert torch.equal(left, right[n : n + 1])
        assert torch.equal(alone.model_input, batch.model_input[[n, n + 3, n + 6]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_do_not_change_the_bits(many_threads: None, layout: str) -> None:
    given = extended(everything((3, 8, 64, 64), model="bfloat16"), *FEATURES, layout=layout, mask="channels")
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(step(NATIVE, given))
    for other in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(results[0], other, strict=True))


@pytest.mark.parametrize("copies", [1, 2, 3, None])
@pytest.mark.parametrize("features", ["variance", "weights"])
@pytest.mark.parametrize("target", TARGETS)
def test_the_model_input_is_repeated(target: Target, features: str, copies: int | None) -> None:
    given = extended(everything(), features, groups=2) | {"copies": copies}
    given["table"][ROW, KNOWN] = math.nan  # unread without a mask
    out = check(target, given)
    assert out.model_input.shape == (2 * (copies or 2), 3, 5, 7)


def test_copies_without_a_model_input() -> None:
    given = everything((2, 3)) | {"copies": 3, "model_input": None}
    assert ops.sampler_step(**given).model_input is None
