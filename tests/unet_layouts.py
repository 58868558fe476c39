"""Small U-Nets in float64, of layouts that differ in all that a rewrite looks at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiff.models import UNet
from fastdiff.models.rewrites import Rewrites

TIMES = torch.tensor([981, 640, 17])


@dataclass(frozen=True)
class Layout:
    """A network, and the inputs of a call besides the time."""

    config: dict[str, Any]
    shape: tuple[int, ...]
    extras: dict[str, Any] = field(default_factory=dict)
    residuals: bool = False

    def network(self) -> UNet:
        torch.manual_seed(5)
        network = UNet(**self.config).eval().requires_grad_(False).double()
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
        return network

    def arguments(self) -> dict[str, Any]:
        arguments = {"sample": normal(*self.shape), **self.extras}
        if self.residuals:
            maps = _maps(self.network(), arguments)
            arguments["down_block_additional_residuals"] = [normal(*shape) for shape in maps]
            arguments["mid_block_additional_residual"] = normal(*maps[-1])
        return arguments


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _maps(network: UNet, arguments: dict[str, Any]) -> list[torch.Size]:
    """The sizes of the stored maps, as the stages on the way up get them."""
    seen: list[torch.Size] = []
    network.rewrites = Rewrites.none()
    for block in network.up_blocks:
        block.register_forward_pre_hook(lambda _, given: seen.extend(skip.shape for skip in reversed(given[1])))
    with torch.no_grad():
        network(timestep=3, **arguments)
    return seen[::-1]


_BASE = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 12],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
}
_CROSSED = {
    **_BASE,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
}
_TOKENS = {"encoder_hidden_states": normal(2, 5, 6)}
_SIZES = {"text_embeds": normal(2, 10), "time_ids": torch.tensor([[64.0, 48.0, 0.0, 8.0, 64.0, 64.0]]).repeat(2, 1)}

LAYOUTS = {
    # On the way up 12 + 8 and 8 + 8 channels in 4 groups: the first has a group on both sides.
    "straddling": Layout(_BASE, (1, 3, 8, 12)),
    "odd": Layout({**_BASE, "downsample_padding": 0, "mid_block_scale_factor": 1.4142}, (3, 3, 9, 7)),
    "one-group": Layout({**_BASE, "norm_num_groups": 1, "layers_per_block": 2}, (2, 3, 6, 5)),
    "group-a-channel": Layout({**_BASE, "block_out_channels": [4, 4], "in_channels": 1}, (2, 1, 8, 8)),
    "scale-shift": Layout(
        {**_BASE, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 7, "norm_num_groups": 2},
        (2, 3, 8, 6),
        {"class_labels": torch.tensor([2, 6])},
    ),
    "resampling-blocks": Layout(
        {
            **_BASE,
            "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "block_out_channels": [8, 12],
        },
        (2, 3, 12, 8),
    ),
    "resampling-scale-shift": Layout(
        {
            **_CROSSED,
            "down_block_types": ["ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
            "resnet_time_scale_shift": "scale_shift",
            "resnet_out_scale_factor": 1.3,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 5,
            "class_embeddings_concat": True,
            "time_cond_proj_dim": 3,
            "time_embedding_type": "fourier",
        },
        (2, 3, 8, 8),
        {**_TOKENS, "class_labels": normal(2, 5), "timestep_cond": normal(2, 3)},
    ),
    "added-and-controlled": Layout(
        {
            **_CROSSED,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 2,
            "projection_class_embeddings_input_dim": 22,
        },
        (2, 3, 7, 10),
        {**_TOKENS, "added_cond_kwargs": _SIZES},
        residuals=True,
    ),
    "three-stages": Layout(
        {
            **_BASE,
            "block_out_channels": [6, 12, 18],
            "norm_num_groups": 3,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": 6,
        },
        (1, 3, 13, 16),
    ),
}
