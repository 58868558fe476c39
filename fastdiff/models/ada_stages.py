"""The stages of the latent upscaler's U-Net: norms that the time scales and shifts, smooth resampling, one stored map.

Source: Crowson's k-diffusion (image_v1), on Dhariwal and Nichol 2021, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

from torch import Tensor, nn

from fastdiff.models.ada import AdaNorm
from fastdiff.models.attention import PackedAttention, projected_onto, to_tokens
from fastdiff.models.blocks import DownStage, ResnetSettings, UpStage, paired, shortcut
from fastdiff.models.context import Context
from fastdiff.models.embeddings import ACTIVATIONS
from fastdiff.models.filters import filter_down, filter_up
from fastdiff.models.maps import Map, convolved_onto, laid_out, total
from fastdiff.models.prepacked import convolve

__all__ = ["AdaDownStage", "AdaUpStage", "ada_down_stage", "ada_up_stage"]

_GROUP = 32
"""Channels in a group of the norms."""


class AdaResnetBlock(nn.Module):
    """shortcut(x) + conv2(dropout(act(norm2(conv1(act(norm1 x)))))) with norms that read the time.

    x: (N, in_channels, H, W) -> (N, out_channels, H, W); `inner` channels between the convolutions, in `groups` groups.
    """

    def __init__(
        self, in_channels: int, inner: int, out_channels: int, settings: ResnetSettings, *, groups: int
    ) -> None:
        super().__init__()
        assert settings.time_channels is not None
        self.act = ACTIVATIONS[settings.act]
        self.norm1 = AdaNorm(settings.time_channels, in_channels, groups=in_channels // _GROUP, eps=settings.eps)
        self.conv1 = nn.Conv2d(in_channels, inner, 3, padding=1)
        self.norm2 = AdaNorm(settings.time_channels, inner, groups=groups, eps=settings.eps)
        self.dropout = nn.Dropout(settings.dropout)
        self.conv2 = nn.Conv2d(inner, out_channels, 3, padding=1)
        own_shortcut = in_channels != out_channels
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1, bias=False) if own_shortcut else None

    def forward(self, x: Map, context: Context, skip: Tensor | None = None) -> Map:
        x, skip = paired(x, skip, self.conv_shortcut, context)
        h, x = self.norm1(x, context, skip), total(x)
        h = convolve(self.conv1, self.act(h), context.packs)
        h = self.dropout(self.act(self.norm2(h, context)))
        return convolved_onto(shortcut(self.conv_shortcut, x, skip, context), self.conv2, h, 1.0, context)


class AdaAttention(nn.Module):
    """x += attention(norm1 x) if `own`; x += attention(norm2 x, text) over the pixels of x (N, C, H, W)."""

    def __init__(self, channels: int, *, head_dim: int, text_channels: int, time_channels: int, own: bool) -> None:
        super().__init__()
        groups, heads = max(1, channels // _GROUP), channels // head_dim
        self.own = own
        if own:
            self.norm1 = AdaNorm(time_channels, channels, groups=groups)
            self.attn1 = PackedAttention(channels, heads=heads, head_dim=head_dim, bias=True)
        self.norm2 = AdaNorm(time_channels, channels, groups=groups)
        self.attn2 = PackedAttention(
            channels, heads=heads, head_dim=head_dim, context_channels=text_channels, bias=True
        )
        self.attn2.norm_cross = nn.LayerNorm(text_channels)

    def forward(self, x: Map, context: Context) -> Map:
        if self.own:
            h = self.attn1.attended(to_tokens(self.norm1(x, context)), context, mask=context.mask)
            x = projected_onto(total(x), self.attn1.to_out[0], h, 1.0, context)
        h = to_tokens(self.norm2(x, context))
        h = self.attn2.attended(h, context, context.tokens, context.token_mask)
        return projected_onto(total(x), self.attn2.to_out[0], h, 1.0, context)


class AdaDownStage(DownStage):
    """Residual blocks, then the map halved, which is not stored. stores: whether the blocks' outputs are."""

    def __init__(
        self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module], *, halves: bool, stores: bool
    ) -> None:
        super().__init__(resnets, attentions, None)
        self.halves, self.stores = halves, stores

    def forward(self, x: Map, context: Context, residual: Tensor | None = None) -> tuple[Map, list[Map | None]]:
        x, skips = super().forward(x, context, residual)
        if not self.stores:
            skips = [None] * len(skips)
        return (laid_out(filter_down(total(x), reflect=True), context.rewrites) if self.halves else x), skips


class AdaUpStage(UpStage):
    """Residual blocks of which the first takes the latest stored map, if there is one; then the map doubled."""

    def __init__(self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module], *, doubles: bool) -> None:
        super().__init__(resnets, attentions, None)
        self.doubles = doubles

    def forward(self, x: Map, skips: list[Map | None], context: Context, size: object = None) -> Map:
        skip = None if skips[-1] is None else total(skips[-1])
        for index in range(len(self.resnets)):
            x = self._layer(index, x, context, skip)
            skip = None
        return laid_out(filter_up(total(x), reflect=True), context.rewrites) if self.doubles else x


def ada_down_stage(c: SimpleNamespace, stage: int, settings: ResnetSettings) -> AdaDownStage:
    """KDownBlock2D or KCrossAttnDownBlock2D."""
    channels, layers = c.block_out_channels[stage], c.layers_per_block[stage]
    halves = stage < len(c.block_out_channels) - 1
    crossed = c.down_block_types[stage] == "KCrossAttnDownBlock2D"
    inputs = [c.block_out_channels[max(stage - 1, 0)], *[channels] * (layers - 1)]
    return AdaDownStage(
        (AdaResnetBlock(size, channels, channels, settings, groups=channels // _GROUP) for size in inputs),
        _attentions(c, stage, stage, [channels] * layers, settings, own=not halves) if crossed else [],
        halves=halves,
        stores=halves or not crossed,
    )


def ada_up_stage(c: SimpleNamespace, index: int, settings: ResnetSettings) -> AdaUpStage:
    """KUpBlock2D or KCrossAttnUpBlock2D."""
    stage = len(c.block_out_channels) - 1 - index
    channels, layers = c.block_out_channels[stage], c.layers_per_block[stage]
    below = c.block_out_channels[max(stage - 1, 0)]
    crossed = c.up_block_types[index] == "KCrossAttnUpBlock2D"
    # The library knows the first stage by its sizes.
    first = crossed and below == channels == settings.time_channels
    inputs = [channels if first else 2 * channels, *[channels] * (layers - 1)]
    outputs = [*[channels] * (layers - 1), below]
    # Without cross-attention the last block is narrow inside as well.
    inners = [channels] * layers if crossed else outputs
    sizes = zip(inputs, inners, outputs, strict=True)
    return AdaUpStage(
        (AdaResnetBlock(*three, settings, groups=channels // _GROUP) for three in sizes),
        _attentions(c, stage, index, outputs, settings, own=first) if crossed else [],
        doubles=stage > 0,
    )


def _attentions(
    c: SimpleNamespace, stage: int, index: int, sizes: list[int], settings: ResnetSettings, *, own: bool
) -> list[AdaAttention]:
    assert settings.time_channels is not None
    return [
        AdaAttention(
            size,
            # The library reads this list in the order of the way down on the way up too.
            head_dim=c.attention_head_dim[index] or c.block_out_channels[stage],
            text_channels=c.cross_attention_dim[stage],
            time_channels=settings.time_channels,
            own=own,
        )
        for size in sizes
    ]
