"""group_norm_silu: silu((h - mean) / sqrt(var + eps) * weight + bias) with h = x + addend + residual."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import NATIVE, TARGETS, Target
from inputs import DTYPES, normal
from norm_cases import (
    LAID_OUT,
    LARGE,
    OPTIONS,
    SHAPES,
    Shape,
    call,
    check,
    in_layout,
    plainly,
    schema_arguments,
    tensors,
    truth,
)
from tolerance import assert_close_to_truth

from fastdiff import ops
from fastdiff.errors import InputError

# The interpreter is NumPy, which warns of infinities that a kernel means.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_options(target: Target, dtype: torch.dtype, layout: str, options: dict[str, Any]) -> None:
    given = tensors(SHAPES["odd"], dtype, options)
    check(target, given | {"x": in_layout(given["x"], layout)})


@pytest.mark.parametrize(("layout", "shape"), LAID_OUT)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_shapes(target: Target, dtype: torch.dtype, layout: str, shape: Shape) -> None:
    given = tensors(shape, dtype, OPTIONS["sum"])
    check(target, given | {"x": in_layout(given["x"], layout)})


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_several_parts(target: Target, dtype: torch.dtype, layout: str, shape: Shape) -> None:
    options = ["affine", "sum"]
    if target.backend == "triton":  # the interpreter takes its time
        options = ["sum" if dtype == torch.float32 else "affine"]
    for option in options:
        given = tensors(shape, dtype, OPTIONS[option])
        check(target, given | {"x": in_layout(given["x"], layout)})


@pytest.mark.parametrize("shape", ["usual", "odd", "one group", "large"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_at_a_mean_of_100_standard_deviations(
    target: Target, dtype: torch.dtype, layout: str, shape: str
) -> None:
    given = tensors((SHAPES | LARGE)[shape], dtype, OPTIONS["affine"], mean=100.0)
    check(target, given | {"x": in_layout(given["x"], layout)})


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_channels_far_apart(target: Target, layout: str) -> None:
    """Means that differ from channel to channel, and an outlier where a part begins."""
    given = tensors(LARGE["large"], torch.float32, OPTIONS["addend"])
    given["addend"] = given["addend"] * 1000
    given["x"][:, :, 0, 0] = 1e4
    check(target, given | {"x": in_layout(given["x"], layout)})


@pytest.mark.parametrize("silu", [True, False], ids=["silu", "no silu"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_extremes(target: Target, dtype: torch.dtype, silu: bool) -> None:
    """Normalised values of -300 to 300, where the exponential over- and underflows, and a constant group."""
    given = tensors(SHAPES["usual"], dtype, {"bias": "own", "silu": silu})
    given["bias"] = torch.linspace(-300.0, 300.0, 64).to(dtype)
    y = check(target, given)
    assert y.isfinite().all()
    given["x"] = torch.full_like(given["x"], 3.0)
    check(target, given)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_small_values(target: Target, dtype: torch.dtype) -> None:
    for bias in (-20.0, -8.0, -1e-3, 1e-3):
        given = tensors(SHAPES["odd"], dtype, {"weight": "own", "bias": "own"})
        check(target, given | {"weight": given["weight"] * 1e-2, "bias": torch.full_like(given["bias"], bias)})


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_nan_and_infinity_which_reach_their_own_group_only(target: Target, dtype: torch.dtype) -> None:
    for bad in (torch.nan, torch.inf):
        given = tensors(SHAPES["usual"], dtype, {})
        given["x"][1, 5, 2, 3] = bad
        y = call(target, given)
        broken = torch.zeros(2, 64, 8, 8, dtype=torch.bool)
        broken[1, 4:6] = True
        assert y.cpu().isnan().equal(broken)


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("target", TARGETS)
def test_nan_of_any_bits_in_a_parameter_stays_nan(target: Target, layout: str, bits: int) -> None:
    given = tensors(SHAPES["usual"], torch.bfloat16, {"weight": "float32", "bias": "float32"})
    given["weight"].view(torch.int32)[3] = bits
    given["bias"].view(torch.int32)[9] = bits
    y = call(target, given | {"x": in_layout(given["x"], layout)})
    assert y.isnan().any(dim=(0, 2, 3)).nonzero().flatten().tolist() == [3, 9]


@pytest.mark.parametrize("target", TARGETS)
def test_layouts_that_are_not_dense_are_taken(target: Target) -> None:
    whole = normal(2, 64, 16, 8, seed=1)
    views = {
        "every second row": whole[:, :, ::2],
        "some channels": whole[:, 32:],
        "transposed": whole.transpose(2, 3),
        "sequence": whole.flatten(2).transpose(1, 2)[:, :, :64],
    }
    for x in views.values():
        given = {"x": x, "groups": 4, "residual": x.flip(0).transpose(0, 1).contiguous().transpose(0, 1)}
        y = call(target, given)
        assert y.is_contiguous()
        assert_close_to_truth(y.cpu(), truth(given)[0], plainly(given))


@pytest.mark.parametrize("target", TARGETS)
def test_arguments_in_another_layout(target: Target) -> None:
    given = tensors(SHAPES["usual"], torch.float32, OPTIONS["sum"])
    given["x"] = given["x"].contiguous(memory_format=torch.channels_last)
    given["weight"] = given["weight"].repeat_interleave(2)[::2]
    given["addend"] = given["addend"].t().contiguous().t()
    check(target, given)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [*LARGE.values(), Shape((4, 32, 24, 24), 32)], ids=[*LARGE, "many groups"])
@pytest.mark.usefixtures("many_threads")
def test_threads_change_no_bit(shape: Shape, dtype: torch.dtype, layout: str) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        given = tensors(shape, dtype, OPTIONS["sum"])
        results.append(call(NATIVE, given | {"x": in_layout(given["x"], layout)}))
    for y, h in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(h, results[0][1])


@pytest.mark.parametrize("shift", [0, 16, 64, 256, 2048, 3968])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_position_in_memory_changes_no_bit(layout: str, shift: int) -> None:
    """The direction in which memory is gone through depends on where x lies."""
    given = tensors(SHAPES["odd"], torch.float32, OPTIONS["affine"])
    x = in_layout(given["x"], layout)
    expected = call(NATIVE, given | {"x": x})
    held = torch.empty(x.numel() + 2048)[shift // 4 :][: x.numel()].as_strided(x.shape, x.stride()).copy_(x)
    assert torch.equal(call(NATIVE, given | {"x": held}), expected)


def test_opcheck_and_compile() -> None:
    for name in ("affine", "sum"):
        given = tensors(SHAPES["usual"], torch.float32, OPTIONS[name])
        for layout in ("contiguous", "channels_last"):
            args = given | {"x": in_layout(given["x"], layout)}
            torch.library.opcheck(torch.ops.fastdiff.group_norm_silu.default, schema_arguments(args))
            rest = {key: value for key, value in args.items() if key not in ("x", "groups")}
            compiled = torch.compile(
                lambda x, rest=rest: ops.group_norm_silu(x, 32, **rest), fullgraph=True, backend="aot_eager"
            )
            torch.testing.assert_close(compiled(args["x"]), ops.group_norm_silu(args["x"], 32, **rest), rtol=0, atol=0)


def test_errors() -> None:
    x = normal(2, 8, 4, 4)
    for arguments, options, message in (
        ((x, 3), {}, "C=8 is not divisible by groups=3"),
        ((x, 0), {}, "C=8 is not divisible by groups=0"),
        ((x[0, 0, 0], 1), {}, r"x has shape \(4,\); expected \(N, C, ...\)"),
        ((x[:0], 2), {}, "at least one element"),
        ((x.long(), 2), {}, "x is torch.int64; expected float32"),
        ((x, 2, normal(7)), {}, r"weight has shape \(7,\); expected \(8,\)"),
        ((x, 2, None, normal(8).double()), {}, "bias is torch.float64"),
        ((x, 2), {"addend": normal(8)}, r"addend has shape \(8,\); expected \(2, 8\)"),
        ((x, 2), {"residual": normal(2, 8, 4, 5)}, "residual has shape"),
        ((x, 2), {"residual": x.half()}, "residual is torch.float16; expected torch.float32"),
    ):
        with pytest.raises(InputError, match=message):
            ops.group_norm_silu(*arguments, **options)
