"""layer_norm_modulate: layer_norm(x + gate * residual) * weight + bias, times 1 + scale, plus shift."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import NATIVE, TARGETS, Target
from inputs import DTYPES, normal
from tolerance import assert_close_to_truth
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.errors import BackendError, InputError
from fastdiff.ops import network_reference

# The interpreter is NumPy, which warns of infinities that a kernel means.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

SHAPES = {
    "usual": (2, 16, 320),
    "odd": (3, 7, 37),
    "one element": (1, 1, 1),
    "one channel": (2, 5, 1),
    "two channels": (2, 3, 2),
    "matrix": (3, 48),
    "map": (2, 4, 5, 40),
    "many samples": (9, 2, 33),
    "many rows": (2, 150, 24),
    "640 channels": (1, 9, 640),
    "1280 channels": (2, 3, 1280),
    "2560 channels": (1, 3, 2560),
    "long row": (1, 2, 9001),
}
ALL_OWN = {name: "own" for name in ("weight", "bias", "scale", "shift", "gate")}
OPTIONS = {
    "plain": {},
    "affine": {"weight": "own", "bias": "own"},
    "float32 affine": {"weight": "float32", "bias": "float32"},
    "weight": {"weight": "own"},
    "bias": {"bias": "float32", "eps": 1e-3},
    "scale": {"scale": "own"},
    "shift": {"shift": "float32", "bias": "own"},
    "modulation": {"scale": "float32", "shift": "float32", "eps": 1e-6},
    "residual": {"residual": True, "weight": "own", "bias": "own"},
    "sum": {"residual": True, "return_sum": True, "weight": "float32"},
    "gate": {"residual": True, "gate": "own", "return_sum": True},
    "sum of x": {"return_sum": True},
    "all": {"residual": True, "return_sum": True, "eps": 1e-6} | ALL_OWN,
    "all float32": {"residual": True, "return_sum": True} | dict.fromkeys(ALL_OWN, "float32"),
}


def tensors(shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any], mean: float = 0.0) -> dict[str, Any]:
    """The arguments of the operator for `options`, whose tensors are given as "own" (dtype) or "float32"."""
    of_channels, of_samples = shape[-1:], (shape[0], shape[-1])
    sizes = dict.fromkeys(("weight", "bias"), of_channels) | dict.fromkeys(("scale", "shift", "gate"), of_samples)
    made = {"x": normal(*shape, seed=1, dtype=dtype, mean=mean)}
    for seed, (name, size) in enumerate((sizes | {"residual": shape}).items(), start=2):
        if name in options:
            made[name] = normal(*size, seed=seed, dtype=torch.float32 if options[name] == "float32" else dtype)
    return made | {name: value for name, value in options.items() if name not in made}


def plainly(given: dict[str, Any]) -> Tensor:
    """What PyTorch's own functions give in the dtype of x."""
    x = given["x"]

    def own(name: str) -> Tensor | None:
        return given[name].to(x.dtype) if name in given else None

    def of_sample(name: str) -> Tensor:
        return own(name).reshape(len(x), *[1] * (x.dim() - 2), -1)

    h = x
    if "residual" in given:
        h = x + (of_sample("gate") * given["residual"] if "gate" in given else given["residual"])
    y = F.layer_norm(h, h.shape[-1:], own("weight"), own("bias"), given.get("eps", 1e-5))
    if "scale" in given:
        y = y * (1 + of_sample("scale"))
    return y + of_sample("shift") if "shift" in given else y


def truth(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
    names = ("x", "weight", "bias", "scale", "shift")
    eps = wide.get("eps", 1e-5)
    return network_reference.layer_norm_modulate(
        *(wide.get(name) for name in names), eps, wide.get("residual"), wide.get("gate"), True
    )


def call(target: Target, given: dict[str, Any]) -> Any:
    moved = target.move(given)
    with target.forced():
        return ops.layer_norm_modulate(moved.pop("x"), **moved)


def check(target: Target, given: dict[str, Any]) -> Tensor:
    result = call(target, given)
    x, (true_y, true_h) = given["x"], truth(given)
    y, h = result if given.get("return_sum") else (result, None)
    for name, value in (("y", y), ("h", h)):
        assert value is None or (value.dtype == x.dtype and value.is_contiguous()), name
    assert_close_to_truth(y, true_y, plainly(given))
    if h is not None:
        assert_close_to_truth(h, true_h, true_h.to(x.dtype))
        assert h.data_ptr() != x.data_ptr()
    return y.cpu()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_options(target: Target, dtype: torch.dtype, options: dict[str, Any]) -> None:
    check(target, tensors(SHAPES["odd"], dtype, options))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_shapes(target: Target, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(target, tensors(shape, dtype, OPTIONS["residual"]))
    check(target, tensors(shape, dtype, OPTIONS["all"]))


@pytest.mark.parametrize("shape", ["usual", "odd", "one channel", "2560 channels", "long row"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_at_a_mean_of_100_standard_deviations(target: Target, dtype: torch.dtype, shape: str) -> None:
    for options in ("plain", "all"):
        check(target, tensors(SHAPES[shape], dtype, OPTIONS[options], mean=100.0))


@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_a_mean_that_float32_rounds(target: Target) -> None:
    """Plain PyTorch is no measure where its own mean is rounded: the truth of the distances is."""
    given = tensors(SHAPES["usual"], torch.float32, {}, mean=1e4)
    true_y, _ = truth(given)
    assert_close_to_truth(call(target, given).cpu(), true_y, true_y.float())


@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_an_outlier(target: Target) -> None:
    for place in (0, 36):
        given = tensors(SHAPES["odd"], torch.float32, OPTIONS["sum"])
        given["x"][..., place] = 1e4
        check(target, given)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_equal_channels_which_give_the_bias(target: Target, dtype: torch.dtype) -> None:
    for value in (0.0, 3.3, -1234.5):
        given = tensors(SHAPES["usual"], dtype, {"bias": "own", "shift": "own"})
        given["x"] = torch.full_like(given["x"], value)
        y = check(target, given)
        expected = given["bias"].float() + given["shift"].float()[:, None].expand(2, 16, 320)
        assert_close_to_truth(y, expected.double(), expected.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_nan_and_infinity_which_reach_their_own_row_only(target: Target, dtype: torch.dtype) -> None:
    for bad in (torch.nan, torch.inf):
        given = tensors(SHAPES["odd"], dtype, OPTIONS["residual"])
        given["x"][1, 5, 36] = bad
        y = call(target, given)
        broken = torch.zeros(SHAPES["odd"], dtype=torch.bool)
        broken[1, 5] = True
        assert y.cpu().isnan().equal(broken)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_rows_that_lie_in_another_tensor(target: Target, dtype: torch.dtype) -> None:
    """As adaptive norms have them: one linear layer gives all rows of a sample."""
    given = tensors(SHAPES["odd"], dtype, OPTIONS["all"])
    table = normal(3, 6 * 37, seed=9, dtype=dtype)
    shift, scale, gate, *_ = table.chunk(6, dim=1)
    check(target, given | {"shift": shift, "scale": scale, "gate": gate})
    one = normal(1, 37, seed=9, dtype=dtype).expand(3, -1)
    check(target, given | {"shift": one, "gate": one})
    check(target, given | {"scale": scale.t().contiguous().t(), "gate": normal(3, 74, dtype=dtype)[:, ::2]})


@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_layouts(target: Target) -> None:
    whole = normal(2, 12, 60, seed=1)
    views = {
        "every second row": whole[:, ::2],
        "some channels": whole[..., 10:50],
        "pixels of a contiguous map": normal(2, 60, 3, 4, seed=1).flatten(2).transpose(1, 2),
        "expanded": whole[:1].expand(3, -1, -1),
        "at an odd address": whole.flatten()[1:1381].view(2, 10, 69),
    }
    for x in views.values():
        check(target, {"x": x, "residual": x.flip(0), "return_sum": True})
        check(target, {"x": x.flip(0), "residual": x, "weight": normal(2 * x.shape[-1])[::2]})


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(3, 50, 130), (1, 40, 1280), (7, 1, 4000)], ids=str)
def test_threads_change_no_bit(shape: tuple[int, ...], dtype: torch.dtype, many_threads: object) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(call(NATIVE, tensors(shape, dtype, OPTIONS["all"])))
    for y, h in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(h, results[0][1])


def test_opcheck_and_compile() -> None:
    for name in ("affine", "all"):
        given = tensors(SHAPES["map"], torch.float32, OPTIONS[name])
        x = given.pop("x")
        tensors_of = [given.get(argument) for argument in ("weight", "bias", "scale", "shift")]
        last = (given.get("residual"), given.get("gate"), name == "all")
        torch.library.opcheck(torch.ops.fastdiff.layer_norm_modulate.default, (x, *tensors_of, 1e-5, *last))
        compiled = torch.compile(
            lambda x, given=given: ops.layer_norm_modulate(x, **given), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(compiled(x), ops.layer_norm_modulate(x, **given), rtol=0, atol=0)


def test_explanation() -> None:
    text = fastdiff.explain("layer_norm_modulate", normal(2, 3, 8), scale=normal(2, 8))
    assert text.startswith("layer_norm_modulate: native")
    assert "not triton: " in text
    assert "not reference: able, but not preferred" in text
    wide = fastdiff.explain("layer_norm_modulate", normal(2, 3, 8).double())
    assert wide.startswith("layer_norm_modulate: reference")
    assert "takes float32, float16 and bfloat16, not float64" in wide


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter stands for the GPU")
def test_rows_too_long_for_registers_are_named() -> None:
    with fastdiff.use_backend("triton"), pytest.raises(BackendError, match="up to 16384 channels, not 16385"):
        ops.layer_norm_modulate(normal(1, 1, 16385))


def test_errors() -> None:
    x, row = normal(2, 3, 8), normal(2, 8)
    for given, message in (
        ({"x": x[0, 0]}, r"x has shape \(8,\); expected \(N, ..., C\)"),
        ({"x": x[:0]}, "at least one element"),
        ({"x": x.long()}, "x is torch.int64; expected float32"),
        ({"weight": normal(7)}, r"weight has shape \(7,\); expected \(8,\)"),
        ({"bias": normal(8).half()}, r"bias is torch.float16; expected torch.float32 \(as x\)"),
        ({"scale": normal(8)}, r"scale has shape \(8,\); expected \(2, 8\)"),
        ({"shift": normal(3, 8)}, r"shift has shape \(3, 8\); expected \(2, 8\)"),
        ({"shift": row.double()}, "shift is torch.float64"),
        ({"residual": normal(2, 3, 7)}, r"residual has shape \(2, 3, 7\); expected \(2, 3, 8\)"),
        ({"residual": x.half()}, "residual is torch.float16; expected torch.float32"),
        ({"residual": x, "gate": normal(8)}, r"gate has shape \(8,\); expected \(2, 8\)"),
        ({"gate": row}, "gate was given without residual"),
        ({"scale": row.to("meta")}, "scale is on meta"),
    ):
        with pytest.raises(InputError, match=message):
            ops.layer_norm_modulate(**({"x": x} | given))
    with pytest.raises(InputError, match="requires grad"):
        ops.layer_norm_modulate(x, normal(8).requires_grad_())
