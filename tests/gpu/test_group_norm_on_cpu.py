"""group_norm_silu's CUDA kernels, run on the CPU by the shim, in three orders of their threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cuda_shim import ORDERS, Launchers
from inputs import DTYPES, LAYOUTS, normal
from tolerance import assert_close_to_truth

from fastdiff.ops import reference
from fastdiff.ops.reference import memory_format

SHAPES = {
    "one_element": ((1, 1, 1, 1), 1),
    "odd": ((2, 6, 5, 3), 3),
    "short_rows": ((2, 40, 4, 6), 8),  # channels-last: slabs of 8 groups of 5
    "one_channel_a_group": ((3, 32, 4, 4), 32),
    "no_divisor": ((1, 257, 2, 1), 257),  # groups of one channel, a prime number of them
    "wide_rows": ((1, 4104, 1, 3), 1),  # channels-last: more columns than threads
    "several_parts": ((1, 16, 40, 33), 2),
}
DEVICES = {"h200": {"major": 9, "multiprocessors": 132}, "a100": {"major": 8, "multiprocessors": 108}}
VARIANTS = {
    "plain": (),
    "affine": ("weight", "bias", "silu"),
    "weight": ("weight",),
    "bias": ("bias", "silu"),
    "addend": ("addend", "weight", "bias", "silu"),
    "residual": ("residual", "silu", "sum"),
    "all": ("weight", "bias", "addend", "residual", "silu", "sum"),
}


def arguments(shape: tuple[int, ...], groups: int, variant: str, dtype: torch.dtype, layout: str) -> tuple[Any, ...]:
    """Those of the schema; parameters in float32 for every second variant. Means are large: 100 standard deviations."""
    on = VARIANTS[variant]
    samples, channels = shape[:2]
    parameters = torch.float32 if len(on) % 2 else dtype
    like = {"memory_format": LAYOUTS[layout]}
    return (
        normal(*shape, mean=0.0 if "residual" in on else 100.0).to(dtype).contiguous(**like),
        groups,
        normal(channels, seed=1, dtype=parameters) if "weight" in on else None,
        normal(channels, seed=2, dtype=parameters) if "bias" in on else None,
        1e-5,
        "silu" in on,
        normal(samples, channels, seed=3, dtype=parameters) if "addend" in on else None,
        normal(*shape, seed=4, dtype=dtype).contiguous(**like) if "residual" in on else None,
        None,
        "sum" in on,
    )


def eager(x, groups, weight, bias, eps, silu, addend, residual, second, _):
    """What plain PyTorch gives in x's dtype."""
    x = x if second is None else torch.cat([x, second], dim=1)
    h = x.contiguous() if addend is None else x.contiguous() + addend.to(x.dtype)[..., None, None]
    h = h if residual is None else h + residual
    weight, bias = (None if value is None else value.to(x.dtype) for value in (weight, bias))
    y = torch.group_norm(h, groups, weight, bias, eps)
    return F.silu(y) if silu else y, h


def check(shim: Launchers, args: tuple[Any, ...], **device: Any) -> None:
    """Every order of the threads gives the same bits, and these are close to the truth."""
    results = []
    for order in ORDERS:
        shim.device(order, **device)
        results.append(shim.group_norm_silu(*args))
    truth = reference.group_norm_silu(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    plain = eager(*args)
    for index in range(2 if args[-1] else 1):
        assert_close_to_truth(results[0][index], truth[index], plain[index])
        for result in results[1:]:
            assert torch.equal(result[index], results[0][index])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shim: Launchers, shape: str, device: str, dtype: str, layout: str) -> None:
    check(shim, arguments(*SHAPES[shape], "all", DTYPES[dtype], layout), **DEVICES[device])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(shim: Launchers, variant: str, dtype: str, layout: str) -> None:
    check(shim, arguments((2, 24, 4, 6), 6, variant, DTYPES[dtype], layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
def test_large_slab(shim: Launchers, device: str, dtype: str, layout: str) -> None:
    """More than a block holds: a cluster of blocks, or two kernels."""
    args = arguments((1, 8, 120, 128), 2, "affine", DTYPES[dtype], layout)
    check(shim, args, **DEVICES[device])


def test_several_tiles_in_a_part(shim: Launchers) -> None:
    """More than 64 parts of a tile each: a part then goes over several tiles."""
    check(shim, arguments((1, 8, 512, 512), 1, "affine", torch.float32, "contiguous"), **DEVICES["a100"])


@pytest.mark.parametrize("shift", [1, 3])
def test_unaligned_addresses(shim: Launchers, shift: int) -> None:
    args = arguments((2, 16, 4, 4), 4, "all", torch.float16, "contiguous")
    moved = [torch.empty(a.numel() + shift, dtype=a.dtype)[shift:].view(a.shape).copy_(a) for a in (args[0], args[7])]
    check(shim, (moved[0], *args[1:7], moved[1], *args[8:]))


def joined(args: tuple[Any, ...], of_x: int) -> tuple[Any, ...]:
    """The same arguments, the channels from `of_x` on being a second input."""
    layout = {"memory_format": memory_format(args[0])}
    parts = [part.contiguous(**layout) for part in (args[0][:, :of_x], args[0][:, of_x:])]
    return (parts[0], *args[1:7], None, parts[1], args[9])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("shape", "of_x"),
    [("odd", 3), ("short_rows", 24), ("one_channel_a_group", 8), ("no_divisor", 256), ("several_parts", 3)],
)
def test_a_second_input(shim: Launchers, shape: str, of_x: int, device: str, dtype: str, layout: str) -> None:
    """Its border inside a group and between groups, where eight channels go together and where they do not."""
    args = arguments(*SHAPES[shape], "all", DTYPES[dtype], layout)
    check(shim, joined(args, of_x), **DEVICES[device])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("of_x", [3, 8])
def test_a_second_input_of_a_large_slab(shim: Launchers, of_x: int, device: str, layout: str) -> None:
    args = arguments((1, 16, 80, 96), 2, "affine", torch.float32, layout)
    check(shim, joined(args, of_x), **DEVICES[device])


@pytest.mark.parametrize("left_out", ["barriers", "cluster_barriers"])
def test_a_missing_barrier_is_seen(shim: Launchers, left_out: str) -> None:
    args = arguments((1, 16, 40, 40), 2, "affine", torch.float32, "contiguous")
    with pytest.raises(AssertionError):
        check(shim, args, **{left_out: False})
