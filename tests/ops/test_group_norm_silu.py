"""group_norm_silu: silu((h - mean) / sqrt(var + eps) * weight + bias) with h = x + addend + residual."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import NATIVE, TARGETS, Target
from inputs import DTYPES, normal
from tolerance import assert_close_to_truth
from torch import Tensor

from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.ops import reference

# The interpreter is NumPy, which warns of infinities that a kernel means.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@dataclass(frozen=True)
class Shape:
    size: tuple[int, ...]
    groups: int

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.size))} in {self.groups}"


SHAPES = {
    "usual": Shape((2, 64, 8, 8), 32),
    "ten channels a group": Shape((1, 320, 6, 6), 32),
    "odd": Shape((3, 30, 7, 5), 3),
    "one group": Shape((2, 20, 9, 3), 1),
    "groups of one channel": Shape((2, 12, 5, 5), 12),
    "one channel": Shape((2, 1, 6, 7), 1),
    "one element a group": Shape((2, 8, 1, 1), 8),
    "one pixel": Shape((3, 40, 1, 1), 4),
    "matrix": Shape((3, 48), 4),
    "sequence": Shape((2, 24, 37), 8),
    "volume": Shape((1, 16, 3, 5, 6), 4),
    "wide": Shape((1, 70, 2, 3), 2),
}
LARGE = {
    "large": Shape((2, 16, 40, 33), 2),
    "many positions": Shape((1, 2, 370, 370), 1),
    "many channels": Shape((1, 240, 17, 16), 8),
    "last slab part full": Shape((2, 140, 23, 23), 14),
    "wide group": Shape((1, 300, 12, 12), 1),
    "many groups": Shape((1, 200, 12, 13), 200),
}
"""Several parts, tiles, chunks or slabs in each kernel."""
OPTIONS = {
    "plain": {},
    "no silu": {"silu": False},
    "affine": {"weight": "own", "bias": "own"},
    "float32 affine": {"weight": "float32", "bias": "float32"},
    "weight": {"weight": "own"},
    "bias": {"bias": "float32"},
    "addend": {"addend": "own", "weight": "own", "bias": "own"},
    "float32 addend": {"addend": "float32", "return_sum": True},
    "residual": {"residual": True, "weight": "float32"},
    "sum": {"residual": True, "addend": "own", "return_sum": True, "weight": "own", "bias": "own", "eps": 1e-3},
    "sum of x": {"return_sum": True, "silu": False},
}


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
LAID_OUT = [pytest.param("contiguous", shape, id=f"contiguous-{name}") for name, shape in SHAPES.items()]
LAID_OUT += [
    pytest.param("channels_last", shape, id=f"channels_last-{name}")
    for name, shape in SHAPES.items()
    if len(shape.size) in CHANNELS_LAST
]


def in_layout(x: Tensor, layout: str) -> Tensor:
    return x.contiguous(memory_format=CHANNELS_LAST[x.dim()]) if layout == "channels_last" else x


def tensors(shape: Shape, dtype: torch.dtype, options: dict[str, Any], mean: float = 0.0) -> dict[str, Any]:
    """The arguments of the operator for `options`, whose tensors are given as "own" (dtype) or "float32"."""
    batch, channels = shape.size[:2]
    sizes = {"weight": (channels,), "bias": (channels,), "addend": (batch, channels), "residual": shape.size}
    made = {"x": normal(*shape.size, seed=1, dtype=dtype, mean=mean)}
    for seed, (name, size) in enumerate(sizes.items(), start=2):
        if name in options:
            made[name] = normal(*size, seed=seed, dtype=torch.float32 if options[name] == "float32" else dtype)
    rest = {name: value for name, value in options.items() if name not in sizes}
    return made | {"groups": shape.groups} | rest


def plainly(given: dict[str, Any]) -> Tensor:
    """What PyTorch's own functions give in the dtype of x."""
    x, own = given["x"], {name: given[name].to(given["x"].dtype) for name in ("weight", "bias") if name in given}
    if "addend" in given:
        addend = given["addend"].to(x.dtype)
        x = x + addend.reshape(*addend.shape, *[1] * (x.dim() - 2))
    if "residual" in given:
        x = x + given["residual"]
    y = F.group_norm(x, given["groups"], own.get("weight"), own.get("bias"), given.get("eps", 1e-5))
    return F.silu(y) if given.get("silu", True) else y


def truth(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
    names = ("weight", "bias", "addend", "residual")
    weight, bias, addend, residual = (wide.get(name) for name in names)
    return reference.group_norm_silu(
        wide["x"], wide["groups"], weight, bias, wide.get("eps", 1e-5), wide.get("silu", True), addend, residual, True
    )


def call(target: Target, given: dict[str, Any]) -> Any:
    moved = target.move(given)
    with target.forced():
        return ops.group_norm_silu(moved.pop("x"), moved.pop("groups"), **moved)


def check(target: Target, given: dict[str, Any]) -> Tensor:
    result = call(target, given)
    x, (true_y, true_h) = given["x"], truth(given)
    y = result[0] if given.get("return_sum") else result
    assert y.dtype == x.dtype
    assert y.stride() == x.stride()
    assert_close_to_truth(y, true_y, plainly(given))
    if given.get("return_sum"):
        h = result[1]
        assert (h.dtype, h.stride()) == (x.dtype, x.stride())
        assert_close_to_truth(h, true_h, true_h.to(x.dtype))
    return y.cpu()


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
def test_threads_change_no_bit(shape: Shape, dtype: torch.dtype, layout: str) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            given = tensors(shape, dtype, OPTIONS["sum"])
            results.append(call(NATIVE, given | {"x": in_layout(given["x"], layout)}))
    finally:
        torch.set_num_threads(before)
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
            names = ("weight", "bias", "addend", "residual")
            weight, bias, addend, residual = (args.get(name) for name in names)
            torch.library.opcheck(
                torch.ops.fastdiff.group_norm_silu.default,
                (args["x"], 32, weight, bias, 1e-5, True, addend, residual, name == "sum"),
            )
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
