"""3x3 convolutions by Winograd's filtering: the compiled kernel against float64, and where it is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolutions import Shape, channels_last, doubled_convolution
from inputs import normal
from tolerance import assert_close_to_truth, relative_error
from torch import Tensor, nn

from fastdiff.models import prepacked
from fastdiff.models.packs import Packs
from fastdiff.models.prepacked import convolve, convolve_both, convolve_doubled
from fastdiff.models.winograd import tile
from fastdiff.ops import native

EXTENSION: Any = native.extension()
PLAIN = ((3, 3), (1, 1), (1, 1), (1, 1), 1)

pytestmark = [
    pytest.mark.skipif(isinstance(EXTENSION, str), reason="the extension is not built"),
    pytest.mark.usefixtures("threads"),
]


SHAPES = [
    Shape(2, 64, 48, 2, 1),
    Shape(2, 64, 5, 3, 4, (0, 0)),
    Shape(1, 67, 33, 5, 6, (2, 2)),
    Shape(3, 100, 31, 5, 3, (1, 0)),
    Shape(2, 65, 70, 7, 9, (0, 2)),
    Shape(1, 129, 130, 9, 15),
    Shape(3, 300, 64, 8, 8),
    Shape(1, 64, 32, 64, 50),
]
"""The last has more tiles than a strip; several more channels than a block of weights."""


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Of maps after an activation, whose mean is not zero."""
    x, weight, bias = shape.layer()
    return channels_last(F.silu(x)), weight, bias


def run(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None, shape: Shape, size: int) -> Tensor:
    packed = EXTENSION.pack_weight(weight)
    found: Tensor = EXTENSION.winograd(x, packed, bias, addend, shape.outputs, shape.padding, size, False)
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_equals_the_truth(shape: Shape, size: int) -> None:
    x, weight, bias = inputs(shape)
    truth = F.conv2d(x.double(), weight.double(), padding=shape.padding)
    plain = F.conv2d(x, weight, padding=shape.padding)
    addend, bias_column = channels_last(normal(*truth.shape, seed=3)), bias[:, None, None]
    for own_bias, own_addend in ((None, None), (bias, None), (None, addend), (bias, addend)):
        more = (0 if own_bias is None else bias_column) + (0 if own_addend is None else addend)
        found = run(x, weight, own_bias, own_addend, shape, size)
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert_close_to_truth(found, truth + more, plain + more)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[4], SHAPES[5]], ids=str)
def test_native_equals_the_truth_at_twice_the_size(shape: Shape, size: int) -> None:
    x, weight, bias = inputs(shape)
    packed = EXTENSION.pack_weight(weight)
    found = EXTENSION.winograd(x, packed, bias, None, shape.outputs, shape.padding, size, True)
    truth = doubled_convolution(x.double(), weight.double(), bias.double(), shape.padding)
    assert_close_to_truth(found, truth, doubled_convolution(x, weight, bias, shape.padding))


@pytest.mark.parametrize("channels", [1, 3, 17])
def test_native_equals_the_truth_for_few_channels(channels: int) -> None:
    shape = Shape(2, channels, 40, 9, 7)
    x, weight, bias = inputs(shape)
    truth = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    assert_close_to_truth(run(x, weight, bias, None, shape, 2), truth, F.conv2d(x, weight, bias, padding=1))


@pytest.mark.parametrize("size", [2, 4])
def test_native_and_truth_stay_apart_by_the_same_however_many_the_channels(size: int) -> None:
    """Sums of 16: with sums of 128 the error would more than double from 32 channels to 2048."""
    errors = []
    for channels in (32, 2048):
        shape = Shape(1, channels, 32, 8, 8)
        x, weight, _ = inputs(shape)
        truth = F.conv2d(x.double(), weight.double(), padding=1)
        errors.append(relative_error(run(x, weight, None, None, shape, size), truth))
    assert errors[1] < 1.8 * errors[0]


def test_a_weight_of_another_size_is_refused() -> None:
    x, weight, _ = inputs(SHAPES[1])
    with pytest.raises(RuntimeError, match="packed weight"):
        EXTENSION.winograd(x, EXTENSION.pack_weight(weight[:, :8]), None, None, 5, (0, 0), 2, False)


@pytest.mark.parametrize(
    ("shape", "outputs", "geometry", "expected"),
    [
        ((4, 128, 32, 32), 128, PLAIN, 4),
        ((4, 32, 32, 32), 128, PLAIN, 2),
        ((2, 256, 4, 4), 256, PLAIN, 2),
        ((1, 256, 4, 4), 256, PLAIN, 0),
        ((1, 3, 32, 32), 128, PLAIN, 0),
        ((4, 128, 2, 9), 128, ((3, 3), (1, 1), (0, 1), (1, 1), 1), 0),
        ((4, 128, 32, 32), 128, ((3, 3), (2, 2), (1, 1), (1, 1), 1), 0),
        ((4, 128, 32, 32), 128, ((3, 3), (1, 1), (1, 1), (2, 2), 1), 0),
        ((4, 128, 32, 32), 128, ((3, 3), (1, 1), (1, 1), (1, 1), 2), 0),
        ((4, 128, 32, 32), 128, ((1, 1), (1, 1), (0, 0), (1, 1), 1), 0),
        ((4, 128, 32, 32), 512, prepacked._PHASES, 0),
    ],
    ids=["large", "few-channels", "small", "tiny", "image", "empty", "stride", "dilation", "groups", "1x1", "phases"],
)
def test_the_choice(shape: tuple[int, ...], outputs: int, geometry: tuple[Any, ...], expected: int) -> None:
    assert tile(shape, outputs, geometry) == expected


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_layers_use_it(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain layer, of two maps side by side, and at twice the size: the truth, by this kernel, from one weight."""
    calls: list[bool] = []
    kernel = EXTENSION.winograd
    monkeypatch.setattr(EXTENSION, "winograd", lambda *args: calls.append(args[-1]) or kernel(*args))
    conv = nn.Conv2d(128, 64, 3, padding=1, bias=bias).requires_grad_(False)
    x, packs = channels_last(normal(2, 128, 12, 10)), Packs()
    truth = nn.Conv2d(128, 64, 3, padding=1, bias=bias, dtype=torch.float64).requires_grad_(False)
    truth.load_state_dict(conv.state_dict())
    doubled = F.interpolate(x, scale_factor=2.0)
    assert_close_to_truth(convolve(conv, x, packs), truth(x.double()), conv(x))
    assert_close_to_truth(convolve_doubled(conv, x, packs, bias=bias), truth(doubled.double()), conv(doubled))
    assert len(packs.values()) == 1
    halves = channels_last(x[:, :80]), channels_last(x[:, 80:])
    assert_close_to_truth(convolve_both(conv, *halves, packs), truth(x.double()), conv(x))
    assert calls == [False, True, False, False]
