"""Weights laid out for the CPU's products once: the same output, seen when they change, counted, freed, not copied."""

import copy
import pickle
import threading

import pytest
import torch
from small_unet import small_unet
from torch import nn

import fastdiff
from fastdiff.models.blocks import Downsample
from fastdiff.models.context import Context
from fastdiff.models.packs import Packed, Packs
from fastdiff.models.prepacked import apply, convolve, takes
from fastdiff.models.rewrites import Rewrites, names

diffusers = pytest.importorskip("diffusers")

DTYPES = [torch.float32, torch.bfloat16]
WITHOUT = tuple(name for name in names() if name != "prepacked")


def unet():
    model = small_unet()
    return model, (torch.randn(2, 4, 9, 6), 7, torch.randn(2, 5, 24)), lambda m, *a: m(*a).sample


def pixels():
    torch.manual_seed(1)
    model = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    return model, (torch.randn(1, 3, 16, 16), 7), lambda m, *a: m(*a).sample


def autoencoder():
    torch.manual_seed(2)
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
    ).eval()
    return model, (torch.randn(1, 3, 12, 8),), lambda m, *a: m(*a).sample


def transformer():
    torch.manual_seed(3)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=2, sample_size=8
    ).eval()
    labels = torch.tensor([1, 5])
    return model, (torch.randn(2, 4, 8, 8), torch.tensor([7, 7]), labels), lambda m, *a: m(*a).sample


NETWORKS = [unet, pixels, autoencoder, transformer]


def to(dtype, args):
    return [
        value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in args
    ]


def error(y, reference):
    return ((y.double() - reference).norm() / reference.norm()).item()


@pytest.fixture
def single():
    """A convolution, an input, and where its packed weight lies."""
    torch.manual_seed(4)
    return nn.Conv2d(20, 70, 3, padding=1).requires_grad_(False), channels_last(torch.randn(2, 20, 7, 5)), Packs()


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("make", NETWORKS)
def test_a_network_gives_the_same_with_packed_weights(make, dtype):
    model, args, call = make()
    args = to(dtype, args)
    with torch.no_grad():
        reference = call(copy.deepcopy(model).to(dtype).double(), *to(torch.float64, args))
        model.to(dtype)
        eager = error(call(model, *args), reference)
        fastdiff.accelerate(model, strict=True, rewrites=WITHOUT)
        off = error(call(model, *args), reference)
        fastdiff.accelerate(model, strict=True)
        on = [error(call(model, *args), reference) for _ in range(2)]
    bound = 2 * eager + torch.finfo(dtype).eps
    assert off <= bound
    assert max(on) <= bound
    fastdiff.restore(model)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "outputs"),
    [(3, 1, 1, 70), (3, 2, 1, 5), (3, 2, 0, 64), (1, 1, 0, 130), (2, 1, 1, 1)],
    ids=["3x3", "stride-2", "no-padding", "1x1", "2x2"],
)
def test_a_convolution_with_an_addend(kernel, stride, padding, outputs, dtype):
    torch.manual_seed(5)
    conv = nn.Conv2d(37, outputs, kernel, stride=stride, padding=padding, dtype=dtype).requires_grad_(False)
    x = channels_last(torch.randn(3, 37, 7, 6, dtype=dtype))
    plain, packs = conv(x), Packs()
    addend = channels_last(torch.randn_like(plain))
    reference = copy.deepcopy(conv).double()(x.double()) + addend.double()
    assert takes((conv,), x, packs)
    found = convolve(conv, x, packs, addend=addend)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert error(found, reference) <= 2 * error(plain + addend, reference) + torch.finfo(dtype).eps
    bare = reference - addend.double() - conv.bias.double()[:, None, None]
    assert error(convolve(conv, x, packs, bias=False), bare) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(1, 3), (2, 3), (3, 2)], ids=str)
def test_a_map_that_is_smaller_than_the_kernel_is_refused(size, dtype):
    """As the layer itself refuses it."""
    conv = nn.Conv2d(8, 8, 3, stride=2, dtype=dtype).requires_grad_(False)
    x = channels_last(torch.randn(1, 8, *size, dtype=dtype))
    assert takes((conv,), x, Packs())
    for call in (conv, lambda x: convolve(conv, x, Packs())):
        with pytest.raises(RuntimeError, match=r"[Kk]ernel"):
            call(x)


def test_a_weight_that_changes_is_packed_anew(single):
    conv, x, packs = single
    with torch.no_grad():
        for change in (
            lambda: conv.weight.mul_(2.0),
            lambda: conv.load_state_dict({"weight": torch.randn(70, 20, 3, 3), "bias": torch.zeros(70)}),
            lambda: setattr(conv, "weight", nn.Parameter(torch.randn(70, 20, 3, 3), requires_grad=False)),
            lambda: setattr(conv.weight, "data", torch.randn(70, 20, 3, 3)),
        ):
            before = convolve(conv, x, packs)
            change()
            after = convolve(conv, x, packs)
            assert not torch.equal(before, after)
            torch.testing.assert_close(after, conv(x))
    assert len(packs.values()) == 1


def test_one_copy_whatever_the_shapes(single):
    conv, _, packs = single
    for size in (5, 8, 33):
        convolve(conv, channels_last(torch.randn(1, 20, size, size)), packs)
    assert len(packs.values()) == 1
    assert conv.weight.nbytes <= packs.values()[0].nbytes <= conv.weight.nbytes * 128 / 70


@pytest.mark.parametrize(
    "spoil",
    [
        lambda conv, x: (conv.requires_grad_(), x),
        lambda conv, x: (conv, x.clone().requires_grad_()),
        lambda conv, x: (conv, x.contiguous()),
        lambda conv, x: (conv.double(), x.double()),
        lambda conv, x: (nn.Conv2d(20, 70, 3, padding=1, groups=10), x),
        lambda conv, x: (nn.Conv2d(20, 70, 3, padding="same"), x),
        lambda conv, x: (conv, x[:, :19]),
    ],
    ids=["weight-graded", "input-graded", "contiguous", "float64", "groups", "same", "channels"],
)
def test_what_is_left_to_the_layer(single, spoil):
    conv, x, packs = single
    conv, x = spoil(conv, x)
    assert not takes((conv,), x, packs)
    assert packs.values() == []


def test_not_where_a_call_is_observed_or_transformed():
    packs, x, network = Packs(), torch.randn(1, 4, 8, 8), nn.Module()
    network.rewrites = Rewrites()
    assert packs.ready(x, network.rewrites, network) is packs
    assert packs.ready(x.to("meta"), network.rewrites, network) is None
    with torch.autocast("cpu"):
        assert packs.ready(x, network.rewrites, network) is None
    with torch._subclasses.FakeTensorMode():
        assert packs.ready(x, network.rewrites, network) is None
    seen = []
    torch.func.vmap(lambda each: seen.append(packs.ready(each, network.rewrites, network)) or each)(x)
    network.rewrites = Rewrites.none()
    assert packs.ready(x, network.rewrites, network) is None
    assert seen == [None]


def test_a_linear_layer_and_a_1x1_convolution_on_tokens():
    torch.manual_seed(6)
    layer = nn.Linear(300, 65).requires_grad_(False)
    x, packs = torch.randn(2, 130, 300), Packs()
    reference = copy.deepcopy(layer).double()(x.double())
    assert error(apply(layer, x, packs), reference) <= 2 * error(layer(x), reference)
    assert len(packs.values()) == 1


def test_copies_hold_nothing_and_threads_agree(single):
    conv, x, packs = single
    expected = convolve(conv, x, packs)
    assert copy.deepcopy(packs).values() == []
    assert pickle.loads(pickle.dumps(packs)).values() == []
    packs.clear()
    found = []
    threads = [threading.Thread(target=lambda: found.append(convolve(conv, x, packs))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(each, expected) for each in found)


def test_the_copies_are_counted_and_given_back():
    model, args, call = unet()
    size = sum(p.nbytes for p in model.parameters())
    before = sum(fastdiff.report().networks.values())
    fastdiff.accelerate(model, strict=True)
    with torch.no_grad():
        call(model, *args)
        after = sum(fastdiff.report().networks.values())
        assert size / 2 < after - before < 3 * size  # 4 outputs fill a panel too
        fastdiff.accelerate(model, strict=True, rewrites=WITHOUT)
        call(model, *args)
    assert sum(fastdiff.report().networks.values()) - before < size / 2
    fastdiff.restore(model)
    assert sum(fastdiff.report().networks.values()) == before


def test_a_network_sees_a_state_dict_and_copies_pack_their_own():
    model, args, call = unet()
    fastdiff.accelerate(model, strict=True)
    with torch.no_grad():
        first = call(model, *args)
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
        second = call(model, *args)
        assert not torch.equal(first, second)
        assert torch.equal(call(twin, *args), first)
        fastdiff.restore(model)
        torch.testing.assert_close(second, call(model, *args))


def test_gradients_flow_where_they_are_asked_for():
    model, args, call = unet()
    fastdiff.accelerate(model, strict=True)
    model.requires_grad_()
    call(model, *args).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_context_has_none_unless_given():
    assert Context().packs is None


@pytest.mark.parametrize("samples", [1, 2])
def test_a_map_that_is_padded_at_its_end_stays_channels_last(samples):
    """Otherwise nothing after it would be multiplied with packed weights."""
    torch.manual_seed(0)
    layer = Downsample(8, padding=0).requires_grad_(False)
    x = torch.randn(samples, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    packs = Packs().ready(x, Rewrites(), layer)
    y = layer(x, Context(rewrites=Rewrites(), packs=packs))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert sum(value.nbytes for value in packs.others([]) if isinstance(value, Packed)) > 0
    torch.testing.assert_close(y, layer(x, Context(rewrites=Rewrites.none(), packs=None)), rtol=1e-5, atol=1e-5)
