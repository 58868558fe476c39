"""Layers looked at in one compiled call: every change of one is seen; all times are projected in one product."""

import pytest
import torch
from torch import nn

from fastdiff.models.context import Context, Time
from fastdiff.models.packs import Packs
from fastdiff.models.prepacked import convolve, takes
from fastdiff.models.unet import UNet


def write_data(conv):
    conv.weight.data.add_(1.0)


def exchange(name):
    return lambda conv: setattr(conv, name, nn.Parameter(torch.randn_like(getattr(conv, name)), requires_grad=False))


def replaced_forward(conv):
    conv.forward = lambda x: nn.functional.conv2d(x, conv.weight) + 5.0


CHANGES = {
    "written": lambda conv: conv.weight.mul_(2.0),
    "bias-written": lambda conv: conv.bias.add_(2.0),
    "written-through-data": write_data,
    "data-replaced": lambda conv: setattr(conv.weight, "data", torch.randn_like(conv.weight)),
    "strides": lambda conv: conv.weight.set_(conv.weight.flip(0).contiguous().transpose(2, 3)),
    "parameter": exchange("weight"),
    "bias": exchange("bias"),
    "no-bias": lambda conv: setattr(conv, "bias", None),
    "padding": lambda conv: setattr(conv, "padding", (0, 0)),
    "stride": lambda conv: setattr(conv, "stride", (2, 2)),
    "reflected": lambda conv: [setattr(conv, "padding_mode", "reflect")],
    "hook": lambda conv: conv.register_forward_hook(lambda module, args, y: y + 7.0),
    "forward": replaced_forward,
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_a_known_layer_is_seen(change, dtype):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 32, 3, padding=1).to(dtype)
    x = torch.randn(2, 16, 9, 7, dtype=dtype).contiguous(memory_format=torch.channels_last)
    packs = Packs()
    before = [convolve(conv, x, packs) for _ in range(2)]
    CHANGES[change](conv)
    after, expected = convolve(conv, x, packs), conv(x)
    assert torch.equal(*before)
    assert after.shape != before[0].shape or not torch.allclose(after, before[0], rtol=0.01)
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(after, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def test_an_input_that_does_not_fit_a_known_layer_is_refused():
    conv, packs = nn.Conv2d(16, 32, 3), Packs()
    x = torch.randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        convolve(conv, x, packs)
        assert takes((conv,), x, packs)
        assert not takes((conv,), x.contiguous(), packs)
        assert not takes((conv,), x.double(), packs)
        assert not takes((conv,), x[:, :8], packs)
        assert takes((conv,), x[:, :8].contiguous(memory_format=torch.channels_last), packs, second=x[:, 8:].clone())
        assert not takes((conv,), nn.Parameter(x), packs)
    assert not takes((conv,), x, packs)  # a gradient would be recorded


def network(**config):
    torch.manual_seed(1)
    made = UNet(
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        sample_size=8,
        **config,
    )
    return made.eval().requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("config", [{}, {"resnet_time_scale_shift": "scale_shift"}], ids=["added", "scale-shift"])
def test_all_blocks_times_in_one_product(config, dtype):
    made = network(**config).to(dtype)
    time = Time(torch.randn(3, 128, dtype=dtype), nn.functional.silu)
    context = Context(packs=Packs(), time=time)
    projected = made._times.project(context)
    assert projected is not None
    exact = Context(time=Time(time.embedding.double(), nn.functional.silu))
    each = {block: block.project(time, context) for block in projected}
    made.double()
    for block, rows in projected.items():
        reference = block.project(exact.time, exact)
        own = (each[block].double() - reference).norm()
        assert (rows.double() - reference).norm() <= 2 * own + torch.finfo(dtype).eps * reference.norm()


@torch.no_grad()
def test_a_layer_of_other_code_has_its_time_projected_by_that():
    made = network()
    context = Context(packs=Packs(), time=Time(torch.randn(1, 128), nn.functional.silu))
    assert made._times.project(context) is not None
    made.mid_block.resnets[0].time_emb_proj.register_forward_hook(lambda module, args, y: y)
    assert made._times.project(context) is None
