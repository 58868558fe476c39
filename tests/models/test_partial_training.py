"""Where most of a network is frozen, and multiplied with packed weights, the rest gets its gradients all the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inputs import normal
from tolerance import relative_error
from torch import Tensor, nn

import fastdiff
from fastdiff.models import UNet
from fastdiff.models.controlnet import ControlNet
from fastdiff.models.rewrites import Rewrites

PICTURED = {
    **{"in_channels": 3, "out_channels": 3, "block_out_channels": [16, 32], "layers_per_block": 1},
    **{"down_block_types": ["SkipDownBlock2D"] * 2, "up_block_types": ["SkipUpBlock2D"] * 2},
    **{"norm_num_groups": 8, "attention_head_dim": 16, "class_embed_type": "identity"},
}
PLAIN = {
    **{"in_channels": 3, "out_channels": 3, "block_out_channels": [16, 32], "layers_per_block": 1},
    **{"down_block_types": ["DownBlock2D", "AttnDownBlock2D"], "up_block_types": ["AttnUpBlock2D", "UpBlock2D"]},
    **{"norm_num_groups": 8, "attention_head_dim": 16, "class_embed_type": "identity"},
}
CONTROL = {
    **{"block_out_channels": [8, 16], "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]},
    **{"norm_num_groups": 4, "cross_attention_dim": 12, "attention_head_dim": 2, "layers_per_block": 1},
    "conditioning_embedding_out_channels": [4, 6],
}


def randomized(network: nn.Module) -> Any:
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(2)
        for parameter in network.parameters():
            parameter.normal_(0.0, 0.2)
    return network.requires_grad_(False).eval()


def gradients(network: Any, inputs: list[Tensor], trained: list[Tensor], *others: Tensor) -> list[Tensor]:
    """Of the sum of squares of what the network makes of the inputs and the others."""
    for each in trained:
        each.requires_grad_(True).grad = None
    with fastdiff.use_backend("reference"):
        made = network(inputs[0], 7, *others, inputs[1])
        parts = [*made[0], made[1]] if isinstance(made, tuple) else [made]
        torch.stack([part.square().sum() for part in parts]).sum().backward()
    found = [each.grad for each in trained]
    assert all(each is not None and bool(each.any()) for each in found)
    return found  # type: ignore[return-value]


def check(network: Any, inputs: list[Tensor], trained: list[Tensor], *others: Tensor) -> None:
    actual = gradients(network, inputs, trained, *others)
    network.rewrites = Rewrites.none()
    for ours, truth in zip(actual, gradients(network, inputs, trained, *others), strict=True):
        assert relative_error(ours, truth) < 1e-4


@pytest.mark.parametrize("part", ["conv1.bias", "conv2.bias", "conv1.weight", "time_emb_proj.bias", "norm2.weight"])
@pytest.mark.parametrize("config", [PLAIN, PICTURED], ids=["plain", "pictured"])
def test_one_kind_of_parameter_is_trained(config: dict[str, Any], part: str) -> None:
    network = randomized(Classes(UNet(**config)))
    trained = [parameter for name, parameter in network.named_parameters() if name.endswith(f"resnets.0.{part}")]
    assert len(trained) > 3
    check(network, [normal(2, 3, 8, 8), normal(2, 64)], trained)


@pytest.mark.parametrize("config", [PLAIN, PICTURED], ids=["plain", "pictured"])
@pytest.mark.parametrize("place", [0, 1], ids=["the sample", "the class"])
def test_an_input_is_trained(config: dict[str, Any], place: int) -> None:
    inputs = [normal(2, 3, 8, 8), normal(2, 64)]
    check(randomized(Classes(UNet(**config))), inputs, [inputs[place]])


@pytest.mark.parametrize("place", [0, 1], ids=["the sample", "the picture"])
def test_the_picture_to_go_by_is_trained(place: int) -> None:
    inputs = [normal(2, 4, 6, 6), normal(2, 3, 12, 12)]
    check(randomized(ControlNet(**CONTROL)), inputs, [inputs[place]], normal(2, 5, 12))


class Classes(nn.Module):
    """A U-Net whose classes come without a name."""

    def __init__(self, network: UNet) -> None:
        super().__init__()
        self.network = network

    @property
    def rewrites(self) -> Rewrites:
        return self.network.rewrites

    @rewrites.setter
    def rewrites(self, rewrites: Rewrites) -> None:
        self.network.rewrites = rewrites

    def forward(self, sample: Tensor, time: int, classes: Tensor) -> Tensor:
        return self.network(sample, time, class_labels=classes)
