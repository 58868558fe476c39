"""The U-Net of diffusion models: one class for the layouts of diffusers' UNet2DModel and UNet2DConditionModel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.errors import InputError
from fastdiff.models import config as configuration
from fastdiff.models.arena import in_arena
from fastdiff.models.attention import PROMPTS
from fastdiff.models.caches import Cache
from fastdiff.models.conditions import ImageTime, made_once
from fastdiff.models.context import Context
from fastdiff.models.embeddings import ACTIVATIONS
from fastdiff.models.gligen import ObjectEmbedding
from fastdiff.models.maps import Map, laid_out, normed, total
from fastdiff.models.prepacked import convolve
from fastdiff.models.stages import taken_maps, up_stage
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
        self.up_blocks = nn.ModuleList(up_stage(c, index, self._resnet) for index in range(len(c.block_out_channels)))
        self.act = ACTIVATIONS[c.act_fn if c.conditional else "silu"]
        groups = c.norm_num_groups
        if groups is None and not c.conditional:
            groups = min(first // 4, 32)
        self.conv_norm_out: GroupNormSiLU | None = None
        if groups is not None:
            self.conv_norm_out = GroupNormSiLU(groups, first, eps=c.norm_eps, silu=self.act is F.silu)
        if c.attention_type != "default":
            self.position_net = ObjectEmbedding(
                c.cross_attention_dim[0], pictured=c.attention_type == "gated-text-image"
            )
        self._text = Cache(PROMPTS)
        self._hints = Cache(PROMPTS)
        self._times = TimeTables(self)
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
        down_intrablock_additional_residuals: Sequence[Tensor] = (),
        objects: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """The network's output for noisy samples.

        sample: (N, in_channels, H, W), contiguous or channels-last, any H and W. timestep: a number, or (N,).
        encoder_hidden_states: (N, S, cross_attention_dim), where the network has cross-attention. class_labels: int64
        (N,), or what class_embed_type takes. added_cond_kwargs: what addition_embed_type and encoder_hid_dim_type need,
        {"text_embeds": (N, D), "time_ids": (N, 6)} for SDXL, "image_embeds" and "hint" for Kandinsky.
        attention_mask, encoder_attention_mask: (N, keys) or (N, 1 or queries, keys), 1 = attend, 0 = leave out.
        The additional residuals are a ControlNet's, added to the stored maps and after the middle block; those within
        the blocks are a T2I-Adapter's, one for each stage on the way down. objects: what GLIGEN's `ObjectEmbedding` is
        called with.
        """
        t = self._check_input(sample, timestep, encoder_hidden_states)
        added = added_cond_kwargs or {}
        context = Context(
            rewrites=self.rewrites,
            packs=self.packs.ready(sample, self.rewrites, self),
            tokens=encoder_hidden_states,
            mask=as_bias(attention_mask, sample),
            token_mask=as_bias(encoder_attention_mask, sample),
        )
        self._read_time(context, timestep, t, class_labels, timestep_cond, added, sample.dtype)
        context.tokens = self._tokens(encoder_hidden_states, added)
        if objects is not None:
            context.objects = self.position_net(**objects)
        layout = memory_format(sample)
        x, skips = self._descend(self._enter(sample, context, added), context, down_intrablock_additional_residuals)
        if down_block_additional_residuals is not None:
            more = zip(skips, down_block_additional_residuals, strict=True)
            skips = [None if skip is None else total(skip) + residual for skip, residual in more]
        if mid_block_additional_residual is not None:
            x = total(x) + mid_block_additional_residual
        context.picture = None
        for block in self.up_blocks:
            count = taken_maps(block)  # type: ignore[arg-type]
            skips, mine = skips[:-count], skips[-count:]
            x = block(x, mine, context, total(skips[-1]).shape[2:] if skips and skips[-1] is not None else None)
        out = self._leave(x, context)
        if self._c.time_embedding_type == "fourier" and not self._c.conditional:
            out = out / t.reshape(-1, 1, 1, 1)
        return out.contiguous(memory_format=layout) if self.rewrites.channels_last else out

    def _tokens(self, tokens: Tensor | None, added: Mapping[str, Tensor]) -> Tensor | None:
        """What cross-attention looks at."""
        if self.encoder_hid_proj is None:
            return tokens
        given = [tokens]
        if self._c.encoder_hid_dim_type != "text_proj":
            if "image_embeds" not in added:
                raise InputError("UNet: added_cond_kwargs has no 'image_embeds'; encoder_hid_dim_type needs it")
            given.append(added["image_embeds"])
        projection: Callable[..., Tensor] = self.encoder_hid_proj
        if not self.rewrites.text_cache:
            return projection(*given)
        # Keys and values are remembered for the tensor that they were made of, so that has to stay the same one too.
        present = [value for value in given if value is not None]
        made = made_once(self._text, self.encoder_hid_proj, present, lambda: projection(*given))
        return projection(*given) if made is None else made

    def _hint(self, layers: ImageTime, picture: Tensor, context: Context) -> Tensor:
        """What is made of the hint alone: once for a run where it can be."""
        picture, made = laid_out(picture, self.rewrites), None
        if self.rewrites.text_cache:
            # Once for a run, it is not worth a copy of the weights.
            once = replace(context, packs=None)
            made = made_once(self._hints, layers.input_hint_block, [picture], lambda: layers.hint(picture, once))
        return layers.hint(picture, context) if made is None else made

    def _enter(self, sample: Tensor, context: Context, added: Mapping[str, Tensor]) -> Tensor:
        """conv_in of the sample, centred and joined with a hint where the network is so."""
        sample = laid_out(2 * sample - 1 if self._c.center_input_sample else sample, self.rewrites)
        if isinstance(self.add_embedding, ImageTime) and self._c.addition_embed_type == "image_hint":
            # Two times four channels: less to write than the results of two convolutions are to add.
            sample = torch.cat([sample, self._hint(self.add_embedding, added["hint"], context)], dim=1)
        context.picture = sample
        return convolve(self.conv_in, sample, context.packs)

    def _leave(self, x: Map, context: Context) -> Tensor:
        """conv_out of the way up's output, to which NCSN++ adds the picture that came up with it."""
        if self.conv_norm_out is not None:
            x = normed(self.conv_norm_out, x, context, keep=False)
            x = x if self.conv_norm_out.silu else self.act(x)
        return convolve(self.conv_out, total(x), context.packs, addend=context.picture)
