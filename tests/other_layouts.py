"""U-Nets of diffusers off the usual paths: odd sizes and groups, masks, every kind of embedding, deep transformers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from layouts import Case

_PLAIN = {
    "block_out_channels": [12, 18],
    "norm_num_groups": 3,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": 6,
    "layers_per_block": 1,
}
_CROSSED = {
    "block_out_channels": [10, 20],
    "norm_num_groups": 5,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "cross_attention_dim": 14,
    "attention_head_dim": 2,
    "layers_per_block": 1,
}


def _normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _text(samples: int, tokens: int = 9) -> dict[str, Any]:
    return {"encoder_hidden_states": _normal(samples, tokens, 14)}


def _residuals(samples: int, height: int, width: int) -> dict[str, Any]:
    maps = [(10, 1), (10, 1), (10, 2), (20, 2)]
    return {
        "down_block_additional_residuals": [_normal(samples, c, -(-height // s), -(-width // s)) for c, s in maps],
        "mid_block_additional_residual": _normal(samples, 20, -(-height // 2), -(-width // 2)),
    }


OTHERS: dict[str, Case] = {
    "groups of one channel": Case(UNet2DModel, {**_PLAIN, "norm_num_groups": 6}, (1, 3, 6, 10)),
    "one group": Case(UNet2DModel, {**_PLAIN, "norm_num_groups": 1}, (3, 3, 10, 6)),
    "three stages, resampled in ResNet blocks": Case(
        UNet2DModel,
        {
            **_PLAIN,
            "block_out_channels": [12, 18, 24],
            "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
            "downsample_type": "resnet",
            "upsample_type": "resnet",
        },
        (2, 3, 12, 8),
    ),
    "scale-shift norms, classes": Case(
        UNet2DModel,
        {**_PLAIN, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 7, "layers_per_block": 2},
        (2, 3, 8, 8),
        {"class_labels": torch.tensor([6, 0])},
    ),
    "identity classes, centred, scaled middle": Case(
        UNet2DModel,
        {**_PLAIN, "class_embed_type": "identity", "center_input_sample": True, "mid_block_scale_factor": 1.7},
        (2, 3, 4, 8),
        {"class_labels": _normal(2, 48)},
    ),
    "no middle attention": Case(UNet2DModel, {**_PLAIN, "add_attention": False, "downsample_padding": 0}, (1, 3, 8, 8)),
    "one layer each, odd sizes": Case(UNet2DConditionModel, _CROSSED, (1, 4, 7, 11), _text(1)),
    "four layers, linear projections": Case(
        UNet2DConditionModel,
        {**_CROSSED, "transformer_layers_per_block": [4, 3], "use_linear_projection": True},
        (2, 4, 5, 6),
        _text(2, 1),
    ),
    "two and three layers, scale-shift norms": Case(
        UNet2DConditionModel,
        {**_CROSSED, "transformer_layers_per_block": [2, 3], "resnet_time_scale_shift": "scale_shift"},
        (3, 4, 6, 4),
        _text(3),
    ),
    "both masks": Case(
        UNet2DConditionModel,
        {**_CROSSED, "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2},
        (2, 4, 6, 6),
        {
            **_text(2),
            "attention_mask": torch.tensor([[1] * 9, [1, 0, 1, 1, 0, 1, 1, 1, 0]]),
            "encoder_attention_mask": torch.tensor([[1, 0] + [1] * 7, [1] * 4 + [0] * 5]),
        },
    ),
    "control, odd sizes": Case(UNet2DConditionModel, _CROSSED, (2, 4, 5, 7), {**_text(2), **_residuals(2, 5, 7)}),
    "simple projection of classes": Case(
        UNet2DConditionModel,
        {
            **_CROSSED,
            "class_embed_type": "simple_projection",
            "projection_class_embeddings_input_dim": 6,
            "time_embedding_act_fn": "silu",
        },
        (2, 4, 4, 4),
        {**_text(2), "class_labels": _normal(2, 6)},
    ),
    "times as classes, labels beside": Case(
        UNet2DConditionModel,
        {**_CROSSED, "class_embed_type": "timestep", "time_cond_proj_dim": 5},
        (2, 4, 4, 6),
        {**_text(2), "class_labels": torch.tensor([3, 700]), "timestep_cond": _normal(2, 5)},
    ),
    "resampled in ResNet blocks, scaled": Case(
        UNet2DConditionModel,
        {
            **_CROSSED,
            "down_block_types": ["ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
            "resnet_out_scale_factor": 1.4,
            "mid_block_scale_factor": 0.7,
        },
        (1, 4, 6, 8),
        _text(1),
    ),
    "added embeddings": Case(
        UNet2DConditionModel,
        {
            **_CROSSED,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 6,
            "projection_class_embeddings_input_dim": 47,
        },
        (3, 4, 6, 6),
        {**_text(3), "added_cond_kwargs": {"text_embeds": _normal(3, 11), "time_ids": 100 * _normal(3, 6).abs()}},
    ),
    "no middle": Case(UNet2DConditionModel, {**_CROSSED, "mid_block_type": None}, (2, 4, 4, 4), _text(2)),
}
