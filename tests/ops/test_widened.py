"""Convolutions and products of bfloat16 that are made in float32: against float64, rounded once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops import native

EXTENSION: Any = native.extension()

pytestmark = pytest.mark.skipif(isinstance(EXTENSION, str), reason="the extension is not built")

CONVOLUTIONS = {  # samples, channels, height, width, outputs, taps, stride, padding
    "1x1": (2, 24, 5, 7, 20, (1, 1), (1, 1), (0, 0)),
    "1x1 padded": (1, 33, 3, 4, 17, (1, 1), (1, 1), (1, 1)),
    "3x3": (3, 41, 9, 4, 72, (3, 3), (1, 1), (1, 1)),
    "3x3 strided": (2, 36, 9, 10, 130, (3, 3), (2, 2), (1, 1)),
    "one pixel": (1, 61, 1, 1, 3, (3, 3), (1, 1), (1, 1)),
    "one channel": (2, 1, 6, 5, 1, (3, 3), (1, 1), (1, 1)),
    "deep": (1, 620, 4, 4, 65, (3, 3), (1, 1), (1, 1)),
    "mixed": (1, 6, 7, 8, 5, (5, 2), (3, 1), (2, 0)),
    "many pixels": (5, 20, 17, 16, 70, (3, 3), (1, 1), (1, 1)),
}
TILED = {  # samples, channels, height, width, outputs
    "one tile": (1, 32, 2, 2, 32),
    "odd": (1, 41, 5, 7, 72),
    "one row": (2, 33, 1, 9, 64),
    "many tiles": (2, 64, 24, 26, 97),
    "many channels": (1, 300, 8, 8, 33),
    "few channels": (2, 3, 9, 7, 40),
}


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count}-threads", autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def brain(*shape: int, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape) * scale).bfloat16()


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def assert_rounded_once(y: Tensor, exact: Tensor, largest: Tensor, lost: float) -> None:
    """Within half a unit in the last place of the exact value, and what float32 loses of sums of that size."""
    assert y.dtype == torch.bfloat16
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= 2**-8 * 1.001 * exact.abs() + lost * largest).all()


@pytest.mark.parametrize("added", ["plain", "bias", "addend", "both"])
@pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CONVOLUTIONS.items()])
def test_native_convolution_is_the_truth_rounded_once(case: Any, added: str) -> None:
    samples, channels, height, width, outputs, taps, stride, padding = case
    torch.manual_seed(0)
    x, weight = last(brain(samples, channels, height, width)), brain(outputs, channels, *taps)
    exact = F.conv2d(x.double(), weight.double(), None, stride, padding)
    largest = F.conv2d(x.double().abs(), weight.double().abs(), None, stride, padding)
    bias = brain(outputs) if added in ("bias", "both") else None
    addend = last(brain(*exact.shape, scale=20.0)) if added in ("addend", "both") else None
    y = EXTENSION.conv_packed(x, EXTENSION.pack_weight(weight), bias, addend, outputs, taps, stride, padding)
    assert y.is_contiguous(memory_format=torch.channels_last)
    for more in (None if bias is None else bias[:, None, None], addend):
        exact, largest = (exact, largest) if more is None else (exact + more.double(), largest + more.double().abs())
    assert_rounded_once(y, exact, largest, 2**-22)


@pytest.mark.parametrize("size", [(1, 2, 1), (3, 31, 17), (16, 256, 256), (130, 1300, 80), (500, 128, 200)], ids=str)
def test_native_product_is_the_truth_rounded_once(size: tuple[int, int, int]) -> None:
    rows, channels, outputs = size
    torch.manual_seed(1)
    x, weight, bias = brain(rows, channels), brain(outputs, channels), brain(outputs)
    y = EXTENSION.multiply(x, EXTENSION.pack_weight(weight), bias, outputs)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_rounded_once(y, exact, x.double().abs() @ weight.double().abs().T + bias.double().abs(), 2**-22)


@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("doubled", [False, True], ids=["plain", "doubled"])
@pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in TILED.items()])
def test_native_tiles_are_the_truth_rounded_once(shape: Any, doubled: bool, tile: int) -> None:
    samples, channels, height, width, outputs = shape
    torch.manual_seed(2)
    x, weight, bias = last(brain(samples, channels, height, width)), brain(outputs, channels, 3, 3), brain(outputs)
    read = F.interpolate(x.double(), scale_factor=2.0) if doubled else x.double()
    exact = F.conv2d(read, weight.double(), bias.double(), padding=1)
    addend = last(brain(*exact.shape, scale=20.0))
    y = EXTENSION.winograd(x, EXTENSION.pack_weight(weight), bias, addend, outputs, (1, 1), tile, doubled)
    assert y.is_contiguous(memory_format=torch.channels_last)
    # A tile's sums are of as many products as its pixels make together, transformed.
    largest = F.avg_pool2d(F.conv2d(read.abs(), weight.double().abs(), padding=1), 9, 1, 4, count_include_pad=False)
    assert_rounded_once(y, exact + addend.double(), largest + addend.double().abs(), 2**-19)


def test_native_rounds_the_truth_to_nearest_even() -> None:
    """Sums that lie between two numbers of bfloat16, exactly in the middle and beside it, and beyond the largest."""
    large = torch.finfo(torch.bfloat16).max
    first = torch.tensor([1.0, 1.0078125, -1.0, -1.0078125, 1.0, 1.0, large, -large, 0.0, 2**-130]).bfloat16()
    second = torch.tensor([2**-8, 2**-8, -(2**-8), -(2**-8), 2**-9, 3 * 2**-9, large, -large, -0.0, 2**-131])
    weight = torch.stack((first, second.bfloat16()), dim=1)
    y = EXTENSION.multiply(torch.ones(1, 2).bfloat16(), EXTENSION.pack_weight(weight), None, len(first))
    assert torch.equal(y[0], weight.double().sum(1).float().bfloat16())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_native_keeps_the_truth_about_what_is_not_finite(value: float) -> None:
    x, weight = last(brain(1, 40, 6, 6)), brain(70, 40, 3, 3).abs()
    x[0, 3, 0, 0] = value
    packed = EXTENSION.pack_weight(weight)
    y = EXTENSION.conv_packed(x, packed, None, None, 70, (3, 3), (1, 1), (1, 1))
    assert y[0, :, :2, :2].float().equal(torch.full((70, 2, 2), value)) or y[0, :, :2, :2].isnan().all()
    assert y[0, :, 2:].isfinite().all()
    tiled = EXTENSION.winograd(x, packed, None, None, 70, (1, 1), 2, False)
    assert not tiled[0, :, :2, :2].isfinite().any()
    assert tiled[0, :, 4:, 4:].isfinite().all()


def test_a_weight_of_another_type_is_refused() -> None:
    x, packed = last(brain(1, 8, 4, 4)), EXTENSION.pack_weight(torch.randn(4, 8, 3, 3))
    with pytest.raises(RuntimeError, match="float32 or of bfloat16, got"):
        EXTENSION.conv_packed(x, packed, None, None, 4, (3, 3), (1, 1), (1, 1))
    with pytest.raises(RuntimeError, match="float32 or of bfloat16, got"):
        EXTENSION.winograd(x, packed, None, None, 4, (1, 1), 2, False)
