"""The convolution of bfloat16 in transformed tiles: against float64, at every size, with every addition."""

import pytest
import torch
from torch.nn import functional as F

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
    "odd channels": (1, 51, 6, 6, 33),
}


def inputs(shape, scale=1.0):
    samples, channels, height, width, outputs = shape
    torch.manual_seed(0)
    x = (torch.randn(samples, channels, height, width) + 0.5).mul_(scale).bfloat16()
    weight = (torch.randn(outputs, channels, 3, 3) / (9 * channels) ** 0.5).bfloat16()
    return x.to(memory_format=torch.channels_last), weight, torch.randn(outputs).bfloat16()


def run(x, weight, bias=None, addend=None, padding=(1, 1), *, doubled=False):
    packed = extension.pack_winograd_bfloat16(weight, doubled)
    return extension.winograd_bfloat16(x, packed, bias, addend, len(weight), padding, doubled)


def error(y, reference):
    return ((y.double() - reference).norm() / reference.norm()).item()


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count}-threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


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


def test_threads_do_not_change_the_result():
    x, weight, bias = inputs(SHAPES["many tiles"])
    before, results = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        results.append(run(x, weight, bias))
    torch.set_num_threads(before)
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
    packed = extension.pack_winograd_bfloat16(weight, False)
    with pytest.raises(RuntimeError, match="not one for 64 channels and 128 outputs"):
        extension.winograd_bfloat16(x[:, :64], packed, None, None, 128, (1, 1), False)
    with pytest.raises(RuntimeError, match="the addend has not the result's shape"):
        extension.winograd_bfloat16(x, packed, None, x[:, :64], 128, (1, 1), False)
