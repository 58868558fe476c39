"""What a U-Net and a ControlNet have in common: the embeddings, the way down, and the middle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.errors import InputError
from fastdiff.models import config as configuration
from fastdiff.models.attention import SpatialAttention, Transformer
from fastdiff.models.blocks import Downsample, DownStage, MidStage, ResnetBlock, ResnetSettings
from fastdiff.models.context import Context
from fastdiff.models.embeddings import (
    ACTIVATIONS,
    EmbeddingMLP,
    FourierFeatures,
    LearnedTimes,
    Sinusoids,
    class_embedding,
)
from fastdiff.models.maps import Map
from fastdiff.models.prepacked import Packs
from fastdiff.models.rewrites import Rewrites
from fastdiff.models.times import TimeTables

__all__ = ["Trunk", "as_bias"]


class Trunk(nn.Module):
    """conv_in, the embeddings, down_blocks and mid_block of a complete configuration.

    c: that configuration as `fastdiff.models.config.per_stage` gives it, for a U-Net with the same blocks. A subclass
    sets `_times` when it has all its blocks.
    """

    _times: TimeTables

    def __init__(self, config: dict[str, Any], c: SimpleNamespace) -> None:
        super().__init__()
        self.config = config
        self.rewrites = Rewrites()
        self.packs = Packs()
        self._c = c
        time_channels = self._add_embeddings(c)
        self._resnet = ResnetSettings(
            time_channels=2 * time_channels if c.class_embeddings_concat else time_channels,
            groups=c.norm_num_groups,
            eps=c.norm_eps,
            dropout=c.dropout,
            scale_shift=c.resnet_time_scale_shift == "scale_shift",
        )
        first, last = c.block_out_channels[0], c.block_out_channels[-1]
        self.conv_in = nn.Conv2d(c.in_channels, first, c.conv_in_kernel, padding=(c.conv_in_kernel - 1) // 2)
        self.down_blocks = nn.ModuleList(self._down_stage(c, stage) for stage in range(len(c.block_out_channels)))
        self.mid_block = None if c.mid_block_type is None else self._mid_stage(c, last)

    def _descend(self, x: Map, context: Context) -> tuple[Map, list[Map]]:
        """The middle block's output for that of conv_in, and the maps to be stored: x and every layer's output."""
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(x, context)
            skips += outputs
        return (x if self.mid_block is None else self.mid_block(x, context)), skips

    def _check_input(self, sample: Tensor, timestep: Tensor | float | int, tokens: Tensor | None) -> Tensor:
        """The times (N,), after the checks that need no look at the data."""
        name, channels = type(self).__name__, self._c.in_channels
        if sample.dim() != 4 or sample.shape[1] != channels:
            raise InputError(f"{name}: sample has shape {tuple(sample.shape)}; expected (N, {channels}, H, W)")
        if self._c.crossed and (tokens is None or tokens.dim() != 3 or len(tokens) != len(sample)):
            got = None if tokens is None else tuple(tokens.shape)
            raise InputError(f"{name}: encoder_hidden_states is {got}; this network needs ({len(sample)}, S, channels)")
        t = torch.as_tensor(timestep, device=sample.device)
        if t.dim() > 1 or t.numel() not in (1, len(sample)):
            raise InputError(f"{name}: timestep has shape {tuple(t.shape)}; expected a number or ({len(sample)},)")
        return t.expand(len(sample))

    def _add_embeddings(self, c: SimpleNamespace) -> int:
        """The modules of `_embed`; gives the number of channels of the time embedding."""
        base = c.block_out_channels[0]
        features, channels = base, c.time_embedding_dim or 4 * base
        if c.time_embedding_type == "fourier" and c.conditional:
            features = channels = c.time_embedding_dim or 2 * base
            self.time_proj: nn.Module = FourierFeatures(features // 2, scale=1.0, log=False, flip=c.flip_sin_to_cos)
        elif c.time_embedding_type == "fourier":
            features = 2 * base
            self.time_proj = FourierFeatures(base, scale=16.0, log=True, flip=False)
        elif c.time_embedding_type == "learned":
            self.time_proj = LearnedTimes(c.num_train_timesteps, base)
        else:
            self.time_proj = Sinusoids(base, flip=c.flip_sin_to_cos, shift=c.freq_shift)
        self.time_embedding = EmbeddingMLP(
            features, channels, condition_channels=c.time_cond_proj_dim, post_act=c.timestep_post_act
        )
        self.class_embedding = class_embedding(c, features, channels)
        self.add_embedding: nn.Module | None = None
        if c.addition_embed_type == "text_time":
            self.add_time_proj = Sinusoids(c.addition_time_embed_dim, flip=c.flip_sin_to_cos, shift=c.freq_shift)
            self.add_embedding = EmbeddingMLP(c.projection_class_embeddings_input_dim, channels)
        if c.encoder_hid_dim_type == "text_proj":
            self.encoder_hid_proj = nn.Linear(c.encoder_hid_dim, c.cross_attention_dim[0])
        return channels

    def _read_time(
        self,
        context: Context,
        timestep: Tensor | float | int,
        t: Tensor,
        class_labels: Tensor | None,
        timestep_cond: Tensor | None,
        added: Mapping[str, Tensor],
        dtype: torch.dtype,
    ) -> None:
        """Gives the context the time: for each residual block if it was made beforehand, else as an embedding."""
        conditions = (class_labels, timestep_cond, added.get("text_embeds"), added.get("time_ids"))
        # As in the library it is the sample's: a quantized weight has another.
        embed = partial(self._embed, dtype=dtype)
        if context.rewrites.time_cache:
            embedders = (self.time_proj, self.time_embedding, self.class_embedding, self.add_embedding)
            context.projected = self._times.find(timestep, len(t), conditions, embedders, embed, context)
        if context.projected is None:
            context.time = embed(t, conditions)

    def _embed(self, t: Tensor, conditions: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """silu(the embedding (N, time_channels) of the time, the class, and what SDXL adds)."""
        class_labels, condition, text_embeds, time_ids = conditions
        embedding = self.time_embedding(self.time_proj(t).to(dtype), condition)
        if (class_labels is None) != (self.class_embedding is None):
            have = "none" if self.class_embedding is None else "class embeddings"
            got = "None" if class_labels is None else f"shape {tuple(class_labels.shape)}"
            raise InputError(
                f"{type(self).__name__}: class_labels is {got}, but this network has {have}; see num_class_embeds"
            )
        if class_labels is not None and self.class_embedding is not None:
            if self._c.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels).to(dtype)
            classes = self.class_embedding(class_labels).to(dtype)
            concat = self._c.class_embeddings_concat
            embedding = torch.cat([embedding, classes], dim=-1) if concat else embedding + classes
        if self.add_embedding is not None:
            if text_embeds is None or time_ids is None:
                missing = "text_embeds" if text_embeds is None else "time_ids"
                raise InputError(
                    f"{type(self).__name__}: added_cond_kwargs has no {missing!r}; addition_embed_type needs it"
                )
            sizes = self.add_time_proj(time_ids.flatten()).reshape(len(t), -1)
            both = torch.cat([text_embeds, sizes.to(text_embeds.dtype)], dim=-1)
            embedding = embedding + self.add_embedding(both.to(dtype))
        activation = ACTIVATIONS[self._c.time_embedding_act_fn]
        # Every residual block begins its time projection with this silu: once is enough.
        return F.silu(embedding if activation is None else activation(embedding))

    def _down_stage(self, c: SimpleNamespace, stage: int) -> DownStage:
        kind, layers, channels = c.down_block_types[stage], c.layers_per_block[stage], c.block_out_channels[stage]
        inputs = [c.block_out_channels[max(stage - 1, 0)], *[channels] * (layers - 1)]
        resampled = kind == "ResnetDownsampleBlock2D"
        scale = c.resnet_out_scale_factor if resampled else 1.0
        downsampler: nn.Module | None = None
        if stage < len(c.block_out_channels) - 1:
            if resampled or (kind == "AttnDownBlock2D" and c.downsample_type == "resnet"):
                downsampler = ResnetBlock(channels, channels, self._resnet, scale=scale, resample="down")
            else:
                downsampler = Downsample(channels, padding=c.downsample_padding)
        return DownStage(
            (ResnetBlock(size, channels, self._resnet, scale=scale) for size in inputs),
            self._attentions(c, kind, stage, stage, layers),
            downsampler,
        )

    def _mid_stage(self, c: SimpleNamespace, channels: int) -> MidStage:
        scale, last = c.mid_block_scale_factor, len(c.block_out_channels) - 1
        attentions: list[nn.Module] = []
        if c.mid_block_type == "UNetMidBlock2DCrossAttn":
            attentions = self._attentions(c, c.mid_block_type, last, last, 1)
        elif not c.conditional and c.add_attention:
            groups = c.attn_norm_num_groups
            if groups is None and not self._resnet.scale_shift:
                groups = c.norm_num_groups
            attentions = [
                SpatialAttention(
                    channels, head_dim=c.attention_head_dim[-1] or channels, groups=groups, eps=c.norm_eps, scale=scale
                )
            ]
        # The conditional library class leaves out the second block together with the attention.
        count = 1 if c.conditional and not attentions else 2
        return MidStage((ResnetBlock(channels, channels, self._resnet, scale=scale) for _ in range(count)), attentions)

    def _attentions(self, c: SimpleNamespace, kind: str, stage: int, index: int, layers: int) -> list[nn.Module]:
        """The attention blocks of a stage: none, plain, or transformers. index: the stage's place on its way."""
        channels = c.block_out_channels[stage]
        if kind.startswith("Attn"):
            # The library reads this list in the order of the way down on the way up too.
            head_dim = c.attention_head_dim[index] or channels
            return [
                SpatialAttention(channels, head_dim=head_dim, groups=c.norm_num_groups, eps=c.norm_eps)
                for _ in range(layers)
            ]
        if "CrossAttn" not in kind:
            return []
        depths = c.transformer_layers_per_block[stage]
        if kind == "CrossAttnUpBlock2D" and c.reverse_transformer_layers_per_block is not None:
            depths = c.reverse_transformer_layers_per_block[index]
        return [
            Transformer(
                channels,
                heads=c.num_attention_heads[stage],
                layers=depth,
                context_channels=c.cross_attention_dim[stage],
                groups=c.norm_num_groups,
                linear=c.use_linear_projection,
                crossed_first=c.only_cross_attention[stage] and kind != "UNetMidBlock2DCrossAttn",
            )
            for depth in configuration.spread(depths, layers)
        ]


def as_bias(mask: Tensor | None, sample: Tensor) -> Tensor | None:
    """(N, keys) with 1 = attend -> (N, 1, 1, keys) to add to the scores. As in the library the bias is finite, so that
    a row with nothing to attend to is left as if it had no mask."""
    return None if mask is None else ((1 - mask.to(sample.dtype)) * -10000.0)[:, None, None]
