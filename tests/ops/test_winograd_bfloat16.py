"""The convolution of bfloat16 in transformed tiles: against float64, at every size, with every addition."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastdiff.models import prepacked
from fastdiff.models.prepacked import Packs, convolve, convolve_both, convolve_doubled
from fastdiff.models.winograd import filters
from fastdiff.ops import native

extension = native.extension()
if isinstance(extension, str) or not extension.has_bfloat16_products():
    pytest.skip("needs AVX-512 with bfloat16 products", allow_module_level=True)

AMPLIFIED = (1 + 2 * (5 / 3) ** 2) ** 0.5
"""Roundings of the transformed map, the transformed weight and the result, of independent values: the products that a
result is the sum of have 5 / 3 of its variance along each side."""
SHAPES = {
    "one tile": (1, 32, 2, 2, 32),
    "odd": (1, 40, 5, 7, 72),
    "one row": (2, 32, 1, 9, 64),
    "few tiles": (1, 128, 8, 8, 128),
    "many tiles": (2, 64, 24, 26, 96),
    "many channels": (1, 1056, 8, 8, 64),
    "other channels": (1, 54, 6, 6, 33),
}


def inputs(shape, scale=1.0):
    samples, channels, height, width, outputs = shape
    torch.manual_seed(0)
    x = (torch.randn(samples, channels, height, width) + 0.5).mul_(scale).bfloat16()
    weight = (torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5).bfloat16()
    return x.to(memory_format=torch.channels_last), weight, torch.randn(outputs).bfloat16()


def run(x, weight, bias=None, addend=None, padding=(1, 1), *, doubled=False):
    packed = extension.pack_bfloat16(weight)
    return extension.winograd_bfloat16(x, packed, bias, addend, len(weight), padding, doubled)


def error(y, reference):
    return ((y.double() - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize("padding", [(1, 1), (0, 2), (2, 0)], ids=str)
@pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in SHAPES.items()])
def test_error_is_that_of_roundings(shape, padding, threads):
    x, weight, bias = inputs(shape)
    if min(size + 2 * pad for size, pad in zip(x.shape[2:], padding, strict=True)) < 3:
        pytest.skip("nothing is left")
    reference = F.conv2d(x.double(), weight.double(), bias.double(), padding=padding)
    y = run(x, weight, bias, padding=padding)
    assert y.dtype == torch.bfloat16
    assert y.shape == reference.shape
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert error(y, reference) < AMPLIFIED * error(reference.bfloat16(), reference)


@pytest.mark.parametrize("shape", [pytest.param(shape, id=name) for name, shape in SHAPES.items()])
def test_doubled_reads_the_map_at_twice_its_size(shape, threads):
    x, weight, bias = inputs(shape)
    reference = F.conv2d(F.interpolate(x.double(), scale_factor=2.0), weight.double(), bias.double(), padding=1)
    y = run(x, weight, bias, doubled=True)
    assert y.shape == reference.shape
    assert error(y, reference) < AMPLIFIED * error(reference.bfloat16(), reference)


@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
def test_addend_is_added_before_rounding(biased):
    """Exact sums of small integers: what is rounded in between would differ."""
    samples, channels, height, width, outputs = SHAPES["few tiles"]
    torch.manual_seed(1)
    x = torch.randint(-1, 2, (samples, channels, height, width)).bfloat16().to(memory_format=torch.channels_last)
    weight = torch.randint(-1, 2, (outputs, channels, 3, 3)).mul(4).bfloat16()
    bias = torch.randint(-8, 9, (outputs,)).bfloat16() if biased else None
    addend = torch.randint(-64, 65, (samples, outputs, height, width)).bfloat16()
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=1) + addend.double()
    assert torch.equal(run(x, weight, bias, addend), exact.bfloat16())


@pytest.mark.usefixtures("many_threads")
def test_threads_do_not_change_the_result():
    x, weight, bias = inputs(SHAPES["many tiles"])
    results = []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(run(x, weight, bias))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_values_that_are_not_numbers_stay_in_reach():
    """What a pixel is not part of does not see it, except within its tile."""
    x, weight, _ = inputs(SHAPES["few tiles"])
    x[0, 3, 0, 0] = float("nan")
    y = run(x, weight)
    assert y[0, :, :2, :2].isnan().all()
    assert not y[0, :, 4:, 4:].isnan().any()


def test_large_and_small_values(threads):
    for scale in (1e30, 1e-30):
        x, weight, _ = inputs(SHAPES["odd"], scale)
        reference = F.conv2d(x.double(), weight.double(), padding=1)
        assert error(run(x, weight), reference) < AMPLIFIED * error(reference.bfloat16(), reference)


def test_a_weight_for_other_channels_is_refused():
    x, weight, _ = inputs(SHAPES["few tiles"])
    packed = extension.pack_bfloat16(weight)
    with pytest.raises(RuntimeError, match="not one for 64 channels and 128 outputs"):
        extension.winograd_bfloat16(x[:, :64], packed, None, None, 128, (1, 1), False)
    with pytest.raises(RuntimeError, match="the addend has not the result's shape"):
        extension.winograd_bfloat16(x, packed, None, x[:, :64], 128, (1, 1), False)


PLAIN = (3, 3), (1, 1), (1, 1), (1, 1), 1


@pytest.mark.parametrize(
    ("shape", "outputs", "geometry", "doubled", "expected"),
    [
        pytest.param((4, 128, 32, 32), 128, PLAIN, False, True, id="large"),
        pytest.param((1, 256, 8, 8), 256, PLAIN, False, True, id="16 tiles"),
        pytest.param((1, 256, 8, 6), 256, PLAIN, False, False, id="12 tiles"),
        pytest.param((1, 256, 4, 4), 256, PLAIN, True, True, id="16 tiles when doubled"),
        pytest.param((1, 257, 8, 8), 256, PLAIN, False, False, id="odd channels"),
        pytest.param((1, 3, 32, 32), 128, PLAIN, False, False, id="image"),
        pytest.param((1, 128, 32, 32), 3, PLAIN, False, False, id="to an image"),
        pytest.param((4, 128, 2, 9), 128, ((3, 3), (1, 1), (0, 1), (1, 1), 1), False, False, id="empty"),
        pytest.param((4, 128, 8, 8), 128, ((3, 3), (1, 1), (0, 0), (1, 1), 1), True, False, id="doubled, no padding"),
        pytest.param((4, 128, 32, 32), 128, ((3, 3), (2, 2), (1, 1), (1, 1), 1), False, False, id="stride"),
        pytest.param((4, 128, 32, 32), 512, prepacked._PHASES, False, False, id="phases"),
    ],
)
def test_the_choice(shape, outputs, geometry, doubled, expected):
    assert filters(shape, outputs, geometry, doubled=doubled) is expected


def close(y, conv, x, addend=None):
    """Small maps have more of the border, where less is added up than the products hold; and halves are rounded."""
    exact = F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), conv.stride, conv.padding)
    exact = exact if addend is None else exact + addend.double()
    return y.shape == exact.shape and error(y, exact) < 1.5 * AMPLIFIED * error(exact.bfloat16(), exact)


@pytest.fixture
def calls(monkeypatch):
    """The names of the compiled functions that were called."""
    found = []
    for name in ("winograd_bfloat16", "convolve_bfloat16"):
        kernel = getattr(extension, name)
        monkeypatch.setattr(extension, name, lambda *args, n=name, k=kernel: found.append(n) or k(*args))
    return found


def layer(channels, outputs, size=3, stride=1):
    torch.manual_seed(2)
    return nn.Conv2d(channels, outputs, size, stride, size // 2).bfloat16().requires_grad_(False)


def maps(*shape):
    return torch.randn(shape).bfloat16().to(memory_format=torch.channels_last)


def test_layers_are_filtered(calls):
    """Plain, with an addend, at twice the size, and of two maps side by side."""
    conv, x, packs = layer(96, 64), maps(2, 96, 12, 10), Packs()
    addend = maps(2, 64, 12, 10)
    assert close(convolve(conv, x, packs, addend=addend), conv, x, addend)
    assert close(convolve_doubled(conv, x, packs, bias=True), conv, F.interpolate(x, scale_factor=2.0))
    halves = [half.contiguous(memory_format=torch.channels_last) for half in (x[:, :40], x[:, 40:])]
    assert close(convolve_both(conv, *halves, packs), conv, x)
    assert calls == ["winograd_bfloat16"] * 4
    assert len(packs.values()) == 3


def test_one_copy_serves_every_size(calls):
    conv, packs = layer(64, 64), Packs()
    for size in (4, 16, 4, 16):
        x = maps(1, 64, size, size)
        assert close(convolve(conv, x, packs), conv, x)
    assert calls == ["convolve_bfloat16", "winograd_bfloat16"] * 2
    assert [held.nbytes for held in packs.values()] == [conv.weight.nbytes]


@pytest.mark.parametrize("conv", [layer(64, 48, 1), layer(64, 48, 3, 2)], ids=["1x1", "strided"])
def test_small_products_are_ours(conv, calls):
    x, packs = maps(1, 64, 8, 8), Packs()
    assert close(convolve(conv, x, packs), conv, x)
    assert calls == ["convolve_bfloat16"]


def test_large_products_are_onednn_s(calls):
    conv, x = layer(512, 512, 1), maps(1, 512, 24, 24)
    assert close(convolve(conv, x, Packs()), conv, x)
    assert calls == []


def test_odd_channels_are_ours(calls):
    conv, x = layer(3, 40, 3), maps(1, 3, 8, 8)
    assert close(convolve(conv, x, Packs()), conv, x)
    assert calls == ["convolve_bfloat16"]
