"""What a U-Net and a ControlNet have in common: the embeddings, the way down, and the middle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError
from fastdiff.models.attention import PackedAttention
from fastdiff.models.blocks import ResnetSettings
from fastdiff.models.conditions import ADDED, HINT_CHANNELS, TextTime, added_embedding, token_projection
from fastdiff.models.config import CONDITIONAL
from fastdiff.models.context import Context, Time
from fastdiff.models.embeddings import (
    ACTIVATIONS,
    EmbeddingMLP,
    FourierFeatures,
    LearnedTimes,
    Sinusoids,
    class_embedding,
)
from fastdiff.models.maps import Map, total
from fastdiff.models.packs import Packs
from fastdiff.models.rewrites import Rewrites
from fastdiff.models.stages import down_stage, mid_stage
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
            act=c.act_fn,
        )
        first = c.block_out_channels[0]
        self.conv_in = nn.Conv2d(c.in_channels, first, c.conv_in_kernel, padding=(c.conv_in_kernel - 1) // 2)
        stages = range(len(c.block_out_channels))
        self.down_blocks = nn.ModuleList(down_stage(c, stage, self._resnet) for stage in stages)
        self.mid_block = None if c.mid_block_type is None else mid_stage(c, self._resnet)

    def _descend(self, x: Map, context: Context, residuals: Sequence[Tensor] = ()) -> tuple[Map, list[Map | None]]:
        """The middle block's output for that of conv_in, and the maps to be stored: x and every layer's output.

        residuals: added at the end of each stage, before it halves the map where it has cross-attention, else after;
        and after the middle block where one more of that shape is left.
        """
        skips: list[Map | None] = [x]
        left = list(residuals)
        for block, kind in zip(self.down_blocks, self._c.down_block_types, strict=True):
            residual = left.pop(0) if left else None
            x, outputs = block(x, context, residual if "CrossAttn" in kind else None)
            if residual is not None and "CrossAttn" not in kind:
                stored = bool(outputs) and outputs[-1] is x
                x = total(x) + residual
                outputs = [*outputs[:-1], x] if stored else outputs
            skips += outputs
        if self.mid_block is not None:
            x = self.mid_block(x, context)
            if left and left[0].shape == total(x).shape:
                x = total(x) + left[0]
        return x, skips

    def sample_channels(self) -> int:
        """Channels of a sample: those of conv_in, of which a hint has some."""
        hinted: int = HINT_CHANNELS if self._c.addition_embed_type == "image_hint" else 0
        channels: int = self._c.in_channels
        return channels - hinted

    def takes_text(self) -> bool:
        """Whether a call takes encoder_hidden_states."""
        pictures = self._c.encoder_hid_dim_type == "image_proj" and self.config["_class_name"] == CONDITIONAL
        return (self._c.crossed and not pictures) or self._c.addition_embed_type == "text"

    @cached_property
    def needs_text(self) -> bool:
        """Whether it needs them: what looks at a text looks at the pixels without one, if it takes their channels."""
        attentions = (module for module in self.modules() if isinstance(module, PackedAttention))
        free = self._c.addition_embed_type != "text" and self._c.encoder_hid_dim_type is None
        return self.takes_text() and not (free and all(each.fits_pixels for each in attentions))

    def _check_input(self, sample: Tensor, timestep: Tensor | float | int, tokens: Tensor | None) -> Tensor:
        """The times (N,), after the checks that need no look at the data."""
        name, channels = type(self).__name__, self.sample_channels()
        if sample.dim() != 4 or sample.shape[1] != channels:
            raise InputError(f"{name}: sample has shape {tuple(sample.shape)}; expected (N, {channels}, H, W)")
        wrong = self.needs_text if tokens is None else tokens.dim() != 3 or len(tokens) != len(sample)
        if wrong and self.takes_text():
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
            features,
            channels,
            act=c.act_fn if c.conditional else "silu",
            condition_channels=c.time_cond_proj_dim,
            post_act=c.timestep_post_act,
        )
        self.class_embedding = class_embedding(c, features, channels)
        self.add_embedding = added_embedding(c, channels)
        if c.addition_embed_type == "text_time":
            self.add_time_proj = Sinusoids(c.addition_time_embed_dim, flip=c.flip_sin_to_cos, shift=c.freq_shift)
        self.encoder_hid_proj = token_projection(c)
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
        """Gives the context the time: for each block that reads it if it was made beforehand, else as an embedding."""
        names = () if self.add_embedding is None else ("text_embeds", "time_ids", "image_embeds")
        text = context.tokens if isinstance(self.add_embedding, TextTime) else None
        conditions = (class_labels, timestep_cond, text, *(added.get(name) for name in names))
        # As in the library it is the sample's: a quantized weight has another.
        embed = partial(self._embed, dtype=dtype)
        if context.rewrites.time_cache:
            embedders = (self.time_proj, self.time_embedding, self.class_embedding, self.add_embedding)
            context.projected = self._times.find(timestep, len(t), conditions, embedders, embed, context)
        if context.projected is None:
            context.time = embed(t, conditions, packs=context.packs)
            context.projected = self._times.project(context)

    def _embed(
        self, t: Tensor, conditions: Sequence[Tensor | None], dtype: torch.dtype, packs: Packs | None = None
    ) -> Time:
        """The embedding (k N, time_channels) of the times (k N,), and of the class and what else is added (N, ...)."""
        class_labels, condition, *more = conditions

        def repeated(x: Tensor) -> Tensor:
            return x if len(x) == len(t) else x.repeat(len(t) // len(x), 1)

        given = None if condition is None else repeated(condition)
        embedding = self.time_embedding(self.time_proj(t).to(dtype), given, packs)
        classes = self._classes(class_labels, dtype)
        if classes is not None:
            classes = repeated(classes)
            # Of one row a sample, once for a run; so is what follows.
            concat = self._c.class_embeddings_concat
            embedding = torch.cat([embedding, classes], dim=-1) if concat else embedding + classes
        if self.add_embedding is not None:
            embedding = embedding + repeated(self._added(more, dtype))
        if self._c.time_embedding_act_fn is not None:
            embedding = ACTIVATIONS[self._c.time_embedding_act_fn](embedding)
        return Time(embedding, ACTIVATIONS[self._c.act_fn])

    def _classes(self, labels: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if (labels is None) != (self.class_embedding is None):
            have = "none" if self.class_embedding is None else "class embeddings"
            got = "None" if labels is None else f"shape {tuple(labels.shape)}"
            raise InputError(
                f"{type(self).__name__}: class_labels is {got}, but this network has {have}; see num_class_embeds"
            )
        if labels is None or self.class_embedding is None:
            return None
        if self._c.class_embed_type == "timestep":
            labels = self.time_proj(labels).to(dtype)
        classes: Tensor = self.class_embedding(labels).to(dtype)
        return classes

    def _added(self, conditions: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
        """What addition_embed_type asks for, (N, time_channels)."""
        tokens, text, sizes, image = conditions
        kind = self._c.addition_embed_type
        given = {"text_embeds": text, "time_ids": sizes, "image_embeds": image}
        for name in ADDED[kind]:
            if given.get(name, image) is None:
                raise InputError(
                    f"{type(self).__name__}: added_cond_kwargs has no {name!r}; addition_embed_type needs it"
                )
        assert self.add_embedding is not None
        if kind == "text":
            added: Tensor = self.add_embedding(tokens)
        elif kind == "text_image":
            added = self.add_embedding(text, image)
        elif kind == "text_time":
            assert text is not None
            assert sizes is not None
            projected = self.add_time_proj(sizes.flatten()).reshape(len(text), -1)
            added = self.add_embedding(torch.cat([text, projected.to(text.dtype)], dim=-1).to(dtype))
        else:
            added = self.add_embedding(image)
        return added


def as_bias(mask: Tensor | None, sample: Tensor) -> Tensor | None:
    """(N, keys) or (N, 1 or queries, keys) with 1 = attend -> (N, 1, 1 or queries, keys) to add to the scores. As in
    the library the bias is finite, so that a row with nothing to attend to is left as if it had no mask."""
    if mask is None:
        return None
    bias = (1 - mask.to(sample.dtype)) * -10000.0
    return bias[:, None, None] if bias.dim() == 2 else bias[:, None]
