"""The packed convolution and product of bfloat16: against float64, at every size, with every addition."""

import pytest
import torch
from torch.nn import functional as F

from fastdiff.ops import native

extension = native.extension()
if isinstance(extension, str) or not extension.has_bfloat16_products():
    pytest.skip("needs AVX-512 with bfloat16 products", allow_module_level=True)

CONVOLUTIONS = {  # samples, channels, height, width, outputs, taps, stride, padding
    "1x1": (2, 24, 5, 7, 20, (1, 1), (1, 1), (0, 0)),
    "1x1 padded": (1, 34, 3, 4, 17, (1, 1), (1, 1), (1, 1)),
    "1x1 strided": (1, 32, 6, 5, 70, (1, 1), (2, 2), (0, 0)),
    "3x3": (3, 40, 9, 4, 72, (3, 3), (1, 1), (1, 1)),
    "3x3 strided": (2, 36, 9, 10, 33, (3, 3), (2, 2), (1, 1)),
    "2x2": (1, 64, 8, 8, 256, (2, 2), (1, 1), (1, 1)),
    "one pixel": (1, 62, 1, 1, 3, (3, 3), (1, 1), (1, 1)),
    "deep": (1, 620, 4, 4, 65, (3, 3), (1, 1), (1, 1)),
    "mixed": (1, 6, 7, 8, 5, (5, 2), (3, 1), (2, 0)),
    "three channels": (2, 3, 9, 8, 40, (3, 3), (1, 1), (1, 1)),
    "odd and strided": (1, 7, 8, 9, 66, (4, 3), (2, 3), (0, 2)),
    "odd pixels": (1, 33, 5, 5, 20, (1, 1), (1, 1), (0, 0)),
    "wide padding": (1, 5, 2, 3, 18, (3, 3), (1, 1), (4, 5)),
}
CASES = [pytest.param(case, id=name) for name, case in CONVOLUTIONS.items()]


def assert_rounded_once(y, exact, largest):
    """Within half a unit in the last place of the exact value, and what float32 sums of this size lose."""
    assert y.dtype == torch.bfloat16
    assert y.shape == exact.shape
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() * 1.001 + 2**-22 * largest).all()


@pytest.mark.parametrize("with_addend", [False, True], ids=["plain", "addend"])
@pytest.mark.parametrize("with_bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("case", CASES)
def test_convolution_is_rounded_once(case, with_bias, with_addend, threads):
    samples, channels, height, width, outputs, taps, stride, padding = case
    torch.manual_seed(0)
    x = torch.randn(samples, channels, height, width).bfloat16().to(memory_format=torch.channels_last)
    weight, bias = torch.randn(outputs, channels, *taps).bfloat16(), torch.randn(outputs).bfloat16()
    bias = bias if with_bias else None
    exact = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), stride, padding)
    largest = F.conv2d(x.double().abs(), weight.double().abs(), None, stride, padding)
    addend = torch.randn(exact.shape).mul(20).bfloat16() if with_addend else None
    packed = extension.pack_bfloat16(weight)
    y = extension.convolve_bfloat16(x, packed, bias, addend, outputs, taps, stride, padding)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_rounded_once(y, exact if addend is None else exact + addend.double(), largest)


@pytest.mark.parametrize("channels", [(32, 64), (1, 31), (600, 40), (9, 16)], ids=str)
def test_two_maps_are_one_product(channels, threads):
    torch.manual_seed(2)
    maps = [torch.randn(2, count, 7, 9).bfloat16().to(memory_format=torch.channels_last) for count in channels]
    weight, bias = torch.randn(70, sum(channels), 1, 1).bfloat16(), torch.randn(70).bfloat16()
    y = extension.convolve_both_bfloat16(*maps, extension.pack_bfloat16(weight), bias, 70)
    x = torch.cat(maps, dim=1).double()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_rounded_once(y, F.conv2d(x, weight.double(), bias.double()), F.conv2d(x.abs(), weight.double().abs(), None))


def test_maps_of_two_sizes_are_refused():
    packed = extension.pack_bfloat16(torch.randn(8, 8, 1, 1).bfloat16())
    x = torch.randn(1, 4, 3, 3).bfloat16()
    with pytest.raises(RuntimeError, match="not the first one's size"):
        extension.convolve_both_bfloat16(x, x[:, :, :2], packed, None, 8)


@pytest.mark.parametrize(
    "size", [(1, 2, 1), (3, 30, 17), (4, 33, 20), (16, 256, 256), (130, 1300, 80), (500, 128, 200)], ids=str
)
def test_product_is_rounded_once(size, threads):
    rows, channels, outputs = size
    torch.manual_seed(1)
    x, weight = torch.randn(rows, channels).bfloat16(), torch.randn(outputs, channels).bfloat16()
    bias = torch.randn(outputs).bfloat16()
    y = extension.multiply_bfloat16(x, extension.pack_bfloat16(weight), bias, outputs)
    exact = F.linear(x.double(), weight.double(), bias.double())
    assert_rounded_once(y, exact, x.double().abs() @ weight.double().abs().T)


def test_product_takes_any_leading_dimensions():
    x, weight = torch.randn(2, 3, 5, 8).bfloat16(), torch.randn(4, 8).bfloat16()
    packed = extension.pack_bfloat16(weight)
    y = extension.multiply_bfloat16(x, packed, None, 4)
    assert torch.equal(y.reshape(-1, 4), extension.multiply_bfloat16(x.reshape(-1, 8), packed, None, 4))


def test_a_weight_for_other_channels_is_refused():
    packed = extension.pack_bfloat16(torch.randn(8, 16).bfloat16())
    with pytest.raises(RuntimeError, match="not one for 18 channels and 8 outputs"):
        extension.multiply_bfloat16(torch.randn(3, 18).bfloat16(), packed, None, 8)
