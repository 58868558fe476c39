"""The U-Net trains: gradients for every parameter, mixed precision, dropout."""

import pytest
import torch

import fastdiff
from fastdiff.models import UNet

CONFIG = {
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [16, 32, 32],
    "norm_num_groups": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "num_class_embeds": 11,
}


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 1, 28, 28, generator=generator), torch.tensor([0, 500, 999]), torch.tensor([0, 3, 10])


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast-bfloat16"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels-last"])
def test_every_parameter_has_a_gradient(autocast, layout):
    torch.manual_seed(0)
    network = UNet(**CONFIG).to(memory_format=layout).train()
    x, t, labels = inputs()
    with fastdiff.use_backend("reference"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = network(x, t, class_labels=labels)
    assert out.shape == x.shape
    assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
    out.float().square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


def test_gradient_matches_a_finite_difference():
    torch.manual_seed(0)
    network = UNet(**CONFIG).double()
    x, t, labels = inputs()
    x = x.double()
    weight = network.mid_block.resnets[0].conv1.weight

    def loss() -> torch.Tensor:
        return network(x, t, class_labels=labels).square().mean()

    with fastdiff.use_backend("reference"):
        loss().backward()
        with torch.no_grad():
            step = 1e-5
            weight[0, 0, 1, 1] += step
            above = loss()
            weight[0, 0, 1, 1] -= 2 * step
            below = loss()
    assert weight.grad[0, 0, 1, 1].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-5)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    network = UNet(**CONFIG, dropout=0.5)
    x, t, labels = inputs()
    with torch.no_grad(), fastdiff.use_backend("reference"):
        network.train()
        assert not torch.equal(network(x, t, class_labels=labels), network(x, t, class_labels=labels))
        network.eval()
        assert torch.equal(network(x, t, class_labels=labels), network(x, t, class_labels=labels))


def test_outside_the_reference_a_gradient_is_refused():
    with pytest.raises(fastdiff.InputError, match="requires grad"):
        UNet(**CONFIG)(*inputs()[:2], class_labels=inputs()[2])
