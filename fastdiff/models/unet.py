"""The U-Net of diffusion models: one class for the layouts of diffusers' UNet2DModel and UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models import config as configuration
from fastdiff.models.arena import in_arena
from fastdiff.models.blocks import ResnetBlock, Upsample, UpStage
from fastdiff.models.context import Context
from fastdiff.models.maps import Map, normed, total
from fastdiff.models.prepacked import convolve
from fastdiff.models.times import TimeTables
from fastdiff.models.trunk import Trunk, as_bias
from fastdiff.nn import GroupNormSiLU
from fastdiff.ops.reference import memory_format


class UNet(Trunk):
    """UNet(**config)(sample, timestep, encoder_hidden_states) -> a tensor (N, out_channels, H, W).

    The configuration's keys, their defaults and the parameters' names are those of diffusers 0.42; `config` holds all
    of them. `_class_name` chooses the layout ("UNet2DModel" or "UNet2DConditionModel"); left out, it follows from the
    keys. To train it, call it inside `fastdiff.use_backend("reference")`, where the operators have gradients.

    Errors: InputError for a key, value or combination that is not supported, named in the message.
    Source: Ho et al. 2020, appendix B; Dhariwal and Nichol 2021; Rombach et al. 2022.
    """

    def __init__(self, **config: Any) -> None:
        whole = configuration.complete(config)
        c = configuration.per_stage(whole)
        super().__init__(whole, c)
        first = c.block_out_channels[0]
        self.up_blocks = nn.ModuleList(self._up_stage(c, stage) for stage in range(len(c.block_out_channels)))
        self._up_layers = [layers + 1 for layers in reversed(c.layers_per_block)]
        self.conv_norm_out = GroupNormSiLU(c.norm_num_groups, first, eps=c.norm_eps)
        self._times = TimeTables(block for block in self.modules() if isinstance(block, ResnetBlock))
        self._time_runs = self._times.runs
        self.conv_out = nn.Conv2d(first, c.out_channels, c.conv_out_kernel, padding=(c.conv_out_kernel - 1) // 2)

    @in_arena
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
            packs=self.packs.ready(sample, self.rewrites),
            tokens=encoder_hidden_states,
            mask=as_bias(attention_mask, sample),
            token_mask=as_bias(encoder_attention_mask, sample),
        )

        self._read_time(context, timestep, t, class_labels, timestep_cond, added_cond_kwargs or {}, sample.dtype)
        layout = memory_format(sample)
        if self.rewrites.channels_last:
            sample = sample.contiguous(memory_format=torch.channels_last)
        x: Map = convolve(self.conv_in, 2 * sample - 1 if self._c.center_input_sample else sample, context.packs)
        x, skips = self._descend(x, context)
        if down_block_additional_residuals is not None:
            skips = [total(skip) + more for skip, more in zip(skips, down_block_additional_residuals, strict=True)]
        if mid_block_additional_residual is not None:
            x = total(x) + mid_block_additional_residual
        for block, layers in zip(self.up_blocks, self._up_layers, strict=True):
            skips, mine = skips[:-layers], skips[-layers:]
            x = block(x, mine, context, total(skips[-1]).shape[2:] if skips else None)
        out = convolve(self.conv_out, normed(self.conv_norm_out, x, context, keep=False), context.packs)
        if self._c.time_embedding_type == "fourier" and not self._c.conditional:
            out = out / t.reshape(-1, 1, 1, 1)
        return out.contiguous(memory_format=layout) if self.rewrites.channels_last else out

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
