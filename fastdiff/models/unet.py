"""The U-Net of diffusion models: one class for the layouts of diffusers' UNet2DModel and UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.errors import InputError
from fastdiff.models import config as configuration
from fastdiff.models.attention import SpatialAttention, Transformer
from fastdiff.models.blocks import Downsample, DownStage, MidStage, ResnetBlock, ResnetSettings, Upsample, UpStage
from fastdiff.models.context import Context
from fastdiff.models.embeddings import (
    ACTIVATIONS,
    EmbeddingMLP,
    FourierFeatures,
    LearnedTimes,
    Sinusoids,
    class_embedding,
)
from fastdiff.models.maps import Map, normed, total
from fastdiff.models.rewrites import Rewrites
from fastdiff.models.times import TimeTables
from fastdiff.nn import GroupNormSiLU
from fastdiff.ops.reference import memory_format


class UNet(nn.Module):
    """UNet(**config)(sample, timestep, encoder_hidden_states) -> a tensor (N, out_channels, H, W).

    The configuration's keys, their defaults and the parameters' names are those of diffusers 0.42; `config` holds all
    of them. `_class_name` chooses the layout ("UNet2DModel" or "UNet2DConditionModel"); left out, it follows from the
    keys. To train it, call it inside `fastdiff.use_backend("reference")`, where the operators have gradients.

    Errors: InputError for a key, value or combination that is not supported, named in the message.
    Source: Ho et al. 2020, appendix B; Dhariwal and Nichol 2021; Rombach et al. 2022.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = configuration.complete(config)
        self.rewrites = Rewrites()
        self._c = c = configuration.per_stage(self.config)
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
        self.up_blocks = nn.ModuleList(self._up_stage(c, stage) for stage in range(len(c.block_out_channels)))
        self._up_layers = [layers + 1 for layers in reversed(c.layers_per_block)]
        self.conv_norm_out = GroupNormSiLU(c.norm_num_groups, first, eps=c.norm_eps)
        self._times = TimeTables(block for block in self.modules() if isinstance(block, ResnetBlock))
        self.conv_out = nn.Conv2d(first, c.out_channels, c.conv_out_kernel, padding=(c.conv_out_kernel - 1) // 2)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | None = None,
        *,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
    ) -> Tensor:
        """The network's output for noisy samples.

        sample: (N, in_channels, H, W), contiguous or channels-last, any H and W. timestep: a number, or (N,).
        encoder_hidden_states: (N, S, cross_attention_dim), where the network has cross-attention. class_labels: int64
        (N,), or what class_embed_type takes. added_cond_kwargs: {"text_embeds": (N, D), "time_ids": (N, 6)} for SDXL.
        attention_mask, encoder_attention_mask: (N, keys), 1 = attend, 0 = leave out.
        The additional residuals are a ControlNet's, added to the stored maps and after the middle block.
        """
        t = self._check_input(sample, timestep, encoder_hidden_states)
        if self._c.encoder_hid_dim_type is not None:
            encoder_hidden_states = self.encoder_hid_proj(encoder_hidden_states)
        context = Context(
            rewrites=self.rewrites,
            tokens=encoder_hidden_states,
            mask=_as_bias(attention_mask, sample),
            token_mask=_as_bias(encoder_attention_mask, sample),
        )

        self._read_time(context, timestep, t, class_labels, timestep_cond, added_cond_kwargs or {})
        layout = memory_format(sample)
        if self.rewrites.channels_last:
            sample = sample.contiguous(memory_format=torch.channels_last)
        x: Map = self.conv_in(2 * sample - 1 if self._c.center_input_sample else sample)
        skips = [x]
        for block in self.down_blocks:
            x, outputs = block(x, context)
            skips += outputs
        if self.mid_block is not None:
            x = self.mid_block(x, context)
        if down_block_additional_residuals is not None:
            skips = [total(skip) + more for skip, more in zip(skips, down_block_additional_residuals, strict=True)]
        if mid_block_additional_residual is not None:
            x = total(x) + mid_block_additional_residual
        for block, layers in zip(self.up_blocks, self._up_layers, strict=True):
            skips, mine = skips[:-layers], skips[-layers:]
            x = block(x, mine, context, total(skips[-1]).shape[2:] if skips else None)
        out: Tensor = self.conv_out(normed(self.conv_norm_out, x, context, keep=False))
        if self._c.time_embedding_type == "fourier" and not self._c.conditional:
            out = out / t.reshape(-1, 1, 1, 1)
        return out.contiguous(memory_format=layout) if self.rewrites.channels_last else out

    def _check_input(self, sample: Tensor, timestep: Tensor | float | int, tokens: Tensor | None) -> Tensor:
        """The times (N,), after the checks that need no look at the data."""
        channels = self._c.in_channels
        if sample.dim() != 4 or sample.shape[1] != channels:
            raise InputError(f"UNet: sample has shape {tuple(sample.shape)}; expected (N, {channels}, H, W)")
        if self._c.crossed and (tokens is None or tokens.dim() != 3 or len(tokens) != len(sample)):
            got = None if tokens is None else tuple(tokens.shape)
            raise InputError(f"UNet: encoder_hidden_states is {got}; this network needs ({len(sample)}, S, channels)")
        t = torch.as_tensor(timestep, device=sample.device)
        if t.dim() > 1 or t.numel() not in (1, len(sample)):
            raise InputError(f"UNet: timestep has shape {tuple(t.shape)}; expected a number or ({len(sample)},)")
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
    ) -> None:
        """Gives the context the time: for each residual block if it was made beforehand, else as an embedding."""
        conditions = (class_labels, timestep_cond, added.get("text_embeds"), added.get("time_ids"))
        if context.rewrites.time_cache:
            embedders = (self.time_proj, self.time_embedding, self.class_embedding, self.add_embedding)
            context.projected = self._times.find(timestep, len(t), conditions, embedders, self._embed, context)
        if context.projected is None:
            context.time = self._embed(t, conditions)

    def _embed(self, t: Tensor, conditions: Sequence[Tensor | None]) -> Tensor:
        """silu(the embedding (N, time_channels) of the time, the class, and what SDXL adds)."""
        class_labels, condition, text_embeds, time_ids = conditions
        dtype = self.time_embedding.linear_1.weight.dtype
        embedding = self.time_embedding(self.time_proj(t).to(dtype), condition)
        if (class_labels is None) != (self.class_embedding is None):
            have = "none" if self.class_embedding is None else "class embeddings"
            got = "None" if class_labels is None else f"shape {tuple(class_labels.shape)}"
            raise InputError(f"UNet: class_labels is {got}, but this network has {have}; see num_class_embeds")
        if class_labels is not None and self.class_embedding is not None:
            if self._c.class_embed_type == "timestep":
                class_labels = self.time_proj(class_labels).to(dtype)
            classes = self.class_embedding(class_labels).to(dtype)
            concat = self._c.class_embeddings_concat
            embedding = torch.cat([embedding, classes], dim=-1) if concat else embedding + classes
        if self.add_embedding is not None:
            if text_embeds is None or time_ids is None:
                missing = "text_embeds" if text_embeds is None else "time_ids"
                raise InputError(f"UNet: added_cond_kwargs has no {missing!r}; addition_embed_type needs it")
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

    def _up_stage(self, c: SimpleNamespace, index: int) -> UpStage:
        stage = len(c.block_out_channels) - 1 - index
        kind, layers, channels = c.up_block_types[index], c.layers_per_block[stage] + 1, c.block_out_channels[stage]
        before = c.block_out_channels[min(stage + 1, len(c.block_out_channels) - 1)]
        below = c.block_out_channels[max(stage - 1, 0)]
        inputs = [before, *[channels] * (layers - 1)]
        skips = [*[channels] * (layers - 1), below]
        resampled = kind == "ResnetUpsampleBlock2D"
        scale = c.resnet_out_scale_factor if resampled else 1.0
        upsampler: nn.Module | None = None
        if stage > 0:
            if resampled or (kind == "AttnUpBlock2D" and c.upsample_type == "resnet"):
                upsampler = ResnetBlock(channels, channels, self._resnet, scale=scale, resample="up")
            else:
                upsampler = Upsample(channels)
        sizes = [own + skip for own, skip in zip(inputs, skips, strict=True)]
        return UpStage(
            (ResnetBlock(size, channels, self._resnet, scale=scale) for size in sizes),
            self._attentions(c, kind, stage, index, layers),
            upsampler,
        )

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


def _as_bias(mask: Tensor | None, sample: Tensor) -> Tensor | None:
    """(N, keys) with 1 = attend -> (N, 1, 1, keys) to add to the scores. As in the library the bias is finite, so that
    a row with nothing to attend to is left as if it had no mask."""
    return None if mask is None else ((1 - mask.to(sample.dtype)) * -10000.0)[:, None, None]
