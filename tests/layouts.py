"""Networks of diffusers with random weights, and inputs for them: what the model tests compare with."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor

DDPM_CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": [32, 64, 64, 64],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
DDPM_CHURCH = {
    **DDPM_CIFAR10,
    "block_out_channels": [32, 32, 64, 288],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
}
ADM = {
    "sample_size": 16,
    "block_out_channels": [32, 64, 96],
    "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "layers_per_block": 1,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "resnet_time_scale_shift": "scale_shift",
    "attention_head_dim": 16,
    "num_class_embeds": 11,
    "mid_block_scale_factor": 1.4142,
    "time_embedding_dim": 80,
    "center_input_sample": True,
}
SD15 = {
    "sample_size": 16,
    "block_out_channels": [32, 64, 96, 96],
    "cross_attention_dim": 48,
    "attention_head_dim": 8,
}
SD21 = {
    **SD15,
    "block_out_channels": [32, 64, 64, 64],
    "attention_head_dim": [2, 4, 8, 8],
    "use_linear_projection": True,
    "upcast_attention": True,
}
SDXL = {
    "sample_size": 16,
    "block_out_channels": [32, 64, 96],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 48,
    "attention_head_dim": [2, 4, 6],
    "transformer_layers_per_block": [1, 2, 3],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 68,
}
VARIED = {
    "sample_size": 16,
    "block_out_channels": [32, 64],
    "down_block_types": ["CrossAttnDownBlock2D", "ResnetDownsampleBlock2D"],
    "up_block_types": ["ResnetUpsampleBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": [1, 2],
    "cross_attention_dim": 48,
    "only_cross_attention": [True, False],
    "transformer_layers_per_block": [[2], 1],
    "reverse_transformer_layers_per_block": [1, [1, 2]],
    "encoder_hid_dim": 20,
    "resnet_time_scale_shift": "scale_shift",
    "resnet_out_scale_factor": 1.3,
    "mid_block_type": "UNetMidBlock2D",
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 10,
    "class_embeddings_concat": True,
    "time_embedding_type": "fourier",
    "time_embedding_act_fn": "gelu",
    "timestep_post_act": "mish",
    "time_cond_proj_dim": 12,
    "conv_in_kernel": 1,
    "conv_out_kernel": 5,
}


@dataclass(frozen=True)
class Case:
    """A library class with a configuration, and the arguments of one call."""

    kind: type[torch.nn.Module]
    config: dict[str, Any]
    shape: tuple[int, ...] = (2, 3, 32, 32)
    extras: dict[str, Any] = field(default_factory=dict)

    def network(self) -> torch.nn.Module:
        """The library's network; every affine parameter is random, so that a forgotten one shows."""
        torch.manual_seed(7)
        network = self.kind(**self.config).eval().requires_grad_(False)
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1 and "time_proj" not in name:
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
        return network

    def call(self, network: torch.nn.Module, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
        """The network's output for this case's inputs, with the network converted to `dtype` and `layout`."""
        generator = torch.Generator().manual_seed(3)
        sample = torch.randn(self.shape, generator=generator).to(dtype, memory_format=layout)
        timestep = torch.tensor([1, 500, 999][: self.shape[0]])
        arguments = {key: _convert(value, dtype) for key, value in self.extras.items()}
        with torch.no_grad():
            out = network.to(dtype, memory_format=layout)(sample, timestep, **arguments)
        return out if isinstance(out, Tensor) else out.sample


def _convert(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {key: _convert(item, dtype) for key, item in value.items()}
    return [_convert(item, dtype) for item in value] if isinstance(value, list) else value


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _tokens(samples: int, width: int = 48) -> dict[str, Any]:
    return {"encoder_hidden_states": _normal(samples, 7, width)}


def _sizes(samples: int) -> dict[str, Tensor]:
    ids = torch.tensor([1024.0, 768.0, 0.0, 16.0, 1024.0, 1024.0]).repeat(samples, 1)
    return {"text_embeds": _normal(samples, 20), "time_ids": ids}


_MASK = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]])

CASES: dict[str, Case] = {
    "ddpm-cifar10": Case(UNet2DModel, DDPM_CIFAR10),
    "ddpm-church-head-288": Case(UNet2DModel, DDPM_CHURCH, (1, 3, 16, 24)),
    "adm": Case(UNet2DModel, ADM, (3, 3, 16, 16), {"class_labels": torch.tensor([0, 4, 10])}),
    "fourier-times": Case(
        UNet2DModel,
        {
            **DDPM_CIFAR10,
            "time_embedding_type": "fourier",
            "block_out_channels": [32, 32, 32, 32],
            "mid_block_type": None,
        },
        (2, 3, 16, 16),
    ),
    "learned-times-timestep-classes": Case(
        UNet2DModel,
        {
            **DDPM_CIFAR10,
            "time_embedding_type": "learned",
            "num_train_timesteps": 1000,
            "class_embed_type": "timestep",
            "add_attention": False,
            "block_out_channels": [32, 32, 32, 32],
        },
        (2, 3, 16, 16),
        {"class_labels": torch.tensor([5, 6])},
    ),
    "sd15": Case(UNet2DConditionModel, SD15, (2, 4, 16, 16), _tokens(2)),
    "sd15-odd-size": Case(UNet2DConditionModel, SD15, (1, 4, 13, 21), _tokens(1)),
    "sd15-masks": Case(UNet2DConditionModel, SD15, (2, 4, 16, 16), {**_tokens(2), "encoder_attention_mask": _MASK}),
    "sd21": Case(UNet2DConditionModel, SD21, (3, 4, 8, 16), _tokens(3)),
    "sdxl": Case(UNet2DConditionModel, SDXL, (2, 4, 16, 16), {**_tokens(2), "added_cond_kwargs": _sizes(2)}),
    "varied": Case(
        UNet2DConditionModel,
        VARIED,
        (2, 4, 8, 8),
        {**_tokens(2, 20), "class_labels": _normal(2, 10), "timestep_cond": _normal(2, 12)},
    ),
    # The middle block has as many pixels as there are tokens, so that one attention_mask fits both.
    "only-crossed-masked": Case(
        UNet2DConditionModel,
        {
            **SD15,
            "block_out_channels": [32, 64],
            "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
            "only_cross_attention": True,
            "layers_per_block": 1,
        },
        (2, 4, 2, 14),
        {**_tokens(2), "attention_mask": _MASK},
    ),
    "plain-attention-beside-crossed": Case(
        UNet2DConditionModel,
        {
            **SD15,
            "block_out_channels": [32, 64],
            "down_block_types": ["AttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "AttnUpBlock2D"],
            "cross_attention_dim": [24, 48],
            "attention_head_dim": [8, 4],
        },
        (2, 4, 8, 8),
        _tokens(2),
    ),
    "controlnet": Case(
        UNet2DConditionModel,
        {**SDXL, "addition_embed_type": None, "layers_per_block": 1},
        (2, 4, 8, 8),
        {
            **_tokens(2),
            "down_block_additional_residuals": [
                _normal(2, 32, 8, 8),
                _normal(2, 32, 8, 8),
                _normal(2, 32, 4, 4),
                _normal(2, 64, 4, 4),
                _normal(2, 64, 2, 2),
                _normal(2, 96, 2, 2),
            ],
            "mid_block_additional_residual": _normal(2, 96, 2, 2),
        },
    ),
}
