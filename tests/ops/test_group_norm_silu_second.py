"""group_norm_silu of two inputs: concat([x, second]) without the concatenation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from backends import NATIVE, TARGETS, Target
from inputs import DTYPES, normal
from norm_cases import OPTIONS, SHAPES, Shape, as_one, call, check, plainly, schema_arguments, split, tensors, truth
from tolerance import assert_close_to_truth

from fastdiff import ops
from fastdiff.errors import InputError

# The interpreter is NumPy, which warns of infinities that a kernel means.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

LAYOUTS = ("contiguous", "channels_last")
BORDERS = {
    "between groups": (Shape((2, 64, 5, 7), 4), 16),
    "inside a group": (Shape((3, 30, 7, 5), 3), 13),
    "inside a group at a multiple of 8": (Shape((1, 96, 6, 4), 3), 40),
    "one channel of x": (Shape((2, 12, 5, 5), 4), 1),
    "one channel of the other": (Shape((1, 33, 4, 4), 11), 32),
    "one group": (Shape((2, 20, 9, 3), 1), 7),
    "groups of one channel": (SHAPES["groups of one channel"], 5),
    "one pixel": (SHAPES["one pixel"], 15),
    "matrix": (SHAPES["matrix"], 20),
    "sequence": (SHAPES["sequence"], 9),
    "volume": (SHAPES["volume"], 6),
}
LARGE_BORDERS = {
    "many positions": (Shape((1, 3, 130, 130), 1), 1),
    "many channels": (Shape((1, 240, 17, 16), 8), 100),
    "many groups": (Shape((2, 200, 12, 13), 50), 130),
}
"""Several parts, tiles, chunks or slabs in each kernel."""
JOINED = {name: options for name, options in OPTIONS.items() if "residual" not in options}


def layouts(shape: Shape) -> tuple[str, ...]:
    return LAYOUTS if len(shape.size) > 3 else LAYOUTS[:1]


LAID_OUT = [
    pytest.param(layout, shape, of_x, id=f"{layout}-{name}")
    for name, (shape, of_x) in BORDERS.items()
    for layout in layouts(shape)
]


@pytest.mark.parametrize("options", JOINED.values(), ids=JOINED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_options(target: Target, layout: str, options: dict[str, Any]) -> None:
    check(target, split(tensors(SHAPES["odd"], torch.float32, options), 13, layout))


@pytest.mark.parametrize(("layout", "shape", "of_x"), LAID_OUT)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_borders(target: Target, dtype: torch.dtype, layout: str, shape: Shape, of_x: int) -> None:
    check(target, split(tensors(shape, dtype, OPTIONS["addend"] | {"return_sum": True}), of_x, layout))


@pytest.mark.parametrize(("shape", "of_x"), LARGE_BORDERS.values(), ids=LARGE_BORDERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_several_parts(target: Target, dtype: torch.dtype, layout: str, shape: Shape, of_x: int) -> None:
    option = "addend" if dtype == torch.float32 else "affine"
    check(target, split(tensors(shape, dtype, OPTIONS[option]), of_x, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_at_means_of_100_and_minus_50_standard_deviations(
    target: Target, dtype: torch.dtype, layout: str
) -> None:
    given = split(tensors(SHAPES["odd"], dtype, OPTIONS["affine"], mean=100.0), 13, layout)
    check(target, given)
    check(target, given | {"second": given["second"] - 150.0})


@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_nan_which_reaches_its_own_group_only(target: Target) -> None:
    for layout in LAYOUTS:
        given = split(tensors(SHAPES["odd"], torch.float32, {}), 13, layout)
        given["second"][1, 2, 2, 3] = torch.nan
        broken = torch.zeros(3, 30, 7, 5, dtype=torch.bool)
        broken[1, 10:20] = True
        assert call(target, given).cpu().isnan().equal(broken)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("of_x", [1, 29])
def test_one_channel_takes_the_layout_of_the_other_input(target: Target, of_x: int) -> None:
    given = split(tensors(SHAPES["odd"], torch.float32, {}), of_x, "channels_last")
    narrow = "x" if of_x == 1 else "second"
    given[narrow] = given[narrow].contiguous()
    y = call(target, given)
    assert y.stride() == (30 * 35, 1, 5 * 30, 30)
    assert_close_to_truth(y.cpu(), truth(as_one(given))[0], plainly(as_one(given)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("shape", "of_x"), LARGE_BORDERS.values(), ids=LARGE_BORDERS)
def test_threads_change_no_bit(shape: Shape, of_x: int, layout: str, many_threads: None) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        given = split(tensors(shape, torch.float32, OPTIONS["addend"] | {"return_sum": True}), of_x, layout)
        results.append(call(NATIVE, given))
    for y, h in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(h, results[0][1])


@pytest.mark.parametrize("shift", [0, 64, 2048, 3968])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_position_in_memory_changes_no_bit(layout: str, shift: int) -> None:
    given = split(tensors(SHAPES["odd"], torch.float32, OPTIONS["affine"]), 13, layout)
    expected, second = call(NATIVE, given), given["second"]
    held = torch.empty(second.numel() + 2048)[shift // 4 :][: second.numel()]
    given["second"] = held.as_strided(second.shape, second.stride()).copy_(second)
    assert torch.equal(call(NATIVE, given), expected)


def test_opcheck_and_compile() -> None:
    for layout in LAYOUTS:
        given = split(tensors(SHAPES["odd"], torch.float32, OPTIONS["addend"] | {"return_sum": True}), 13, layout)
        torch.library.opcheck(torch.ops.fastdiff.group_norm_silu.default, schema_arguments(given))
        rest = {key: value for key, value in given.items() if key not in ("x", "groups")}
        compiled = torch.compile(
            lambda x, rest=rest: ops.group_norm_silu(x, 3, **rest), fullgraph=True, backend="aot_eager"
        )
        expected = ops.group_norm_silu(given["x"], 3, **rest)
        torch.testing.assert_close(compiled(given["x"]), expected, rtol=0, atol=0)


def test_errors() -> None:
    x, second = normal(2, 8, 4, 4), normal(2, 4, 4, 4)
    last = {"memory_format": torch.channels_last}
    for first, other, options, message in (
        (x, second, {"residual": x}, "residual and second come together"),
        (x, normal(2, 4, 4), {}, r"second has shape \(2, 4, 4\); expected \(2, C2, 4, 4\)"),
        (x, normal(1, 4, 4, 4), {}, r"second has shape \(1, 4, 4, 4\); expected \(2, C2, 4, 4\)"),
        (x, normal(2, 4, 4, 5), {}, r"second has shape \(2, 4, 4, 5\)"),
        (x, normal(2, 0, 4, 4), {}, "with C2 at least 1"),
        (x, second.half(), {}, r"second is torch.float16; expected torch.float32 \(as x\)"),
        (x, second.contiguous(**last), {}, r"pass second.contiguous\(memory_format=torch.contiguous_format\)"),
        (x.contiguous(**last), second, {}, r"pass second.contiguous\(memory_format=torch.channels_last\)"),
        (x, normal(2, 3, 4, 4), {}, "C=11 is not divisible by groups=4"),
        (x, second, {"weight": normal(8)}, r"weight has shape \(8,\); expected \(12,\)"),
        (x, second, {"addend": normal(2, 8)}, r"addend has shape \(2, 8\); expected \(2, 12\)"),
        (x, second.to("meta"), {}, "second is on meta, the first tensor on cpu"),
    ):
        with pytest.raises(InputError, match=message):
            ops.group_norm_silu(first, 4, second=other, **options)
