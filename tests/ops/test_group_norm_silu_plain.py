"""The norm that checks its own arguments gives what the long way does, or leaves the call to it."""

import pytest
import torch

from fastdiff import InputError, ops, use_backend
from fastdiff.ops import native

if isinstance(native.extension(), str):
    pytest.skip("needs the compiled extension", allow_module_level=True)

CHANNELS = 8


def a_map(channels=CHANNELS, dtype=torch.bfloat16, height=5):
    return torch.randn(2, channels, height, 3).to(dtype).to(memory_format=torch.channels_last)


def taken(*args, **kwargs):
    """The norm, and whether it went the short way."""
    native.take_plain_norms()
    y = ops.group_norm_silu(*args, **kwargs)
    return y, native.take_plain_norms() == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("silu", [False, True], ids=["norm", "silu"])
@pytest.mark.parametrize("second", [0, 4], ids=["one map", "two maps"])
@pytest.mark.parametrize("affine", [False, True], ids=["bare", "affine"])
def test_the_short_way_gives_the_same_bits(dtype, silu, second, affine):
    torch.manual_seed(0)
    x, total = a_map(dtype=dtype), CHANNELS + second
    weight, bias, addend = torch.randn(total), torch.randn(total).to(dtype), torch.randn(2, 2 * total)[:, ::2]
    given = (weight, bias) if affine else (None, None)
    more = {"silu": silu, "second": a_map(second, dtype) if second else None, "addend": addend if affine else None}
    y, short = taken(x, 2, *given, **more)
    long, other = taken(x, 2, *given, return_sum=True, **more)
    assert short
    assert not other
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, long[0])


@pytest.mark.parametrize(
    "x",
    [a_map(dtype=torch.float64), a_map().contiguous(), torch.randn(2, CHANNELS), a_map()[:, :, ::2]],
    ids=["float64", "contiguous", "no map", "gaps"],
)
def test_what_is_rare_goes_the_long_way(x):
    y, short = taken(x, 2)
    assert not short
    with use_backend("reference"):
        assert torch.allclose(y.double(), ops.group_norm_silu(x.double(), 2), atol=0.02)


def test_a_demand_for_another_backend_is_heard():
    x = a_map()
    with use_backend("reference"):
        assert not taken(x, 2)[1]
    with use_backend("native"):
        assert taken(x, 2)[1]


def test_it_is_counted():
    ops.report(reset=True)
    ops.group_norm_silu(a_map(), 2)
    assert ops.report().calls == {("group_norm_silu", "native"): 1}


@pytest.mark.parametrize(
    ("args", "more", "words"),
    [
        ((3,), {}, "not divisible"),
        ((0,), {}, "not divisible"),
        ((2, torch.ones(CHANNELS + 1)), {}, "weight has shape"),
        ((2, None, torch.ones(CHANNELS).half()), {}, "bias is torch.float16"),
        ((2,), {"addend": torch.ones(1, CHANNELS)}, "addend has shape"),
        ((2,), {"second": a_map(2, height=4)}, "second has shape"),
    ],
    ids=["groups", "no groups", "weight", "dtype", "addend", "second"],
)
def test_what_is_wrong_is_named(args, more, words):
    with pytest.raises(InputError, match=words):
        ops.group_norm_silu(a_map(), *args, **more)


def test_a_gradient_that_would_be_lost_is_refused():
    with pytest.raises(InputError, match="requires grad"):
        ops.group_norm_silu(a_map(), 2, torch.ones(CHANNELS, requires_grad=True))
