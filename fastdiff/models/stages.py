"""The stages of a U-Net for each kind of block that the library knows by name."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

from torch import nn

from fastdiff.models.ada_stages import ada_down_stage, ada_up_stage
from fastdiff.models.added_attention import AddedAttention
from fastdiff.models.attention import SpatialAttention
from fastdiff.models.blocks import Downsample, DownStage, MidStage, ResnetBlock, ResnetSettings, Upsample, UpStage
from fastdiff.models.config import spread
from fastdiff.models.skip_stages import SkipDownStage, SkipUpStage
from fastdiff.models.transformer import Transformer

__all__ = ["down_stage", "mid_stage", "stored_maps", "taken_maps", "up_stage"]

_RESAMPLING = (
    "ResnetDownsampleBlock2D",
    "ResnetUpsampleBlock2D",
    "SimpleCrossAttnDownBlock2D",
    "SimpleCrossAttnUpBlock2D",
)
"""Blocks whose residual blocks resample, scale their results, and may read the time as it is."""


def down_stage(c: SimpleNamespace, stage: int, settings: ResnetSettings) -> DownStage:
    """Stage number `stage` on the way down, of the complete configuration c."""
    kind, layers, channels = c.down_block_types[stage], c.layers_per_block[stage], c.block_out_channels[stage]
    if kind.startswith("K"):
        return ada_down_stage(c, stage, settings)
    inputs = [c.block_out_channels[max(stage - 1, 0)], *[channels] * (layers - 1)]
    attentions = _attentions(c, kind, stage, stage, layers)
    last = stage == len(c.block_out_channels) - 1
    if "Skip" in kind:
        down = None if last else ResnetBlock(channels, channels, settings, **_skip_options(channels, channels, "down"))
        resnets = (ResnetBlock(size, channels, settings, **_skip_options(size, channels)) for size in inputs)
        return SkipDownStage(resnets, attentions, down, channels)
    options = _resnet_options(c, kind)
    downsampler: nn.Module | None = None
    if not last:
        if kind in _RESAMPLING or (kind == "AttnDownBlock2D" and c.downsample_type == "resnet"):
            downsampler = ResnetBlock(channels, channels, settings, resample="down", **options)
        else:
            downsampler = Downsample(channels, padding=c.downsample_padding)
    return DownStage((ResnetBlock(size, channels, settings, **options) for size in inputs), attentions, downsampler)


def up_stage(c: SimpleNamespace, index: int, settings: ResnetSettings) -> UpStage:
    """Stage number `index` on the way up."""
    stage = len(c.block_out_channels) - 1 - index
    kind, layers, channels = c.up_block_types[index], c.layers_per_block[stage] + 1, c.block_out_channels[stage]
    if kind.startswith("K"):
        return ada_up_stage(c, index, settings)
    before = c.block_out_channels[min(stage + 1, len(c.block_out_channels) - 1)]
    below = c.block_out_channels[max(stage - 1, 0)]
    sizes = list(zip([before, *[channels] * (layers - 1)], [*[channels] * (layers - 1), below], strict=True))
    attentions = _attentions(c, kind, stage, index, 1 if kind == "AttnSkipUpBlock2D" else layers)
    if "Skip" in kind:
        up = (
            None if stage == 0 else ResnetBlock(channels, channels, settings, **_skip_options(channels, channels, "up"))
        )
        # The library divides the stored map's channels alone for the blocks with attention.
        grouped = [own + skip // 4 if kind.startswith("Attn") else (own + skip) // 4 for own, skip in sizes]
        resnets = (
            ResnetBlock(sum(size), channels, settings, **{**_skip_options(sum(size), channels), "groups": groups})
            for size, groups in zip(sizes, [(min(g, 32), min(channels // 4, 32)) for g in grouped], strict=True)
        )
        return SkipUpStage(resnets, attentions, up, channels, settings.eps)
    options = _resnet_options(c, kind)
    upsampler: nn.Module | None = None
    if stage > 0:
        if kind in _RESAMPLING or (kind == "AttnUpBlock2D" and c.upsample_type == "resnet"):
            upsampler = ResnetBlock(channels, channels, settings, resample="up", **options)
        else:
            upsampler = Upsample(channels)
    return UpStage((ResnetBlock(sum(size), channels, settings, **options) for size in sizes), attentions, upsampler)


def mid_stage(c: SimpleNamespace, settings: ResnetSettings) -> MidStage:
    """The middle."""
    kind, scale, last = c.mid_block_type, c.mid_block_scale_factor, len(c.block_out_channels) - 1
    channels, groups = c.block_out_channels[-1], settings.groups
    if groups is None:
        groups = min(channels // 4, 32)
    attentions: list[nn.Module] = []
    if "CrossAttn" in kind:
        attentions = _attentions(c, kind, last, last, 1)
    elif not c.conditional and c.add_attention:
        own = c.attn_norm_num_groups
        if own is None and not settings.scale_shift:
            own = groups
        head_dim = c.attention_head_dim[-1] or channels
        attentions = [SpatialAttention(channels, head_dim=head_dim, groups=own, eps=c.norm_eps, scale=scale)]
    # The conditional library class leaves out the second block together with the attention.
    count = 1 if c.conditional and not attentions else 2
    activated = kind != "UNetMidBlock2DSimpleCrossAttn" or not c.resnet_skip_time_act
    options = {"scale": scale, "activated_time": activated, "groups": (groups, groups)}
    return MidStage((ResnetBlock(channels, channels, settings, **options) for _ in range(count)), attentions)


def stored_maps(stage: DownStage) -> int:
    """How many maps a stage on the way down stores."""
    halved = int(isinstance(stage, SkipDownStage) and stage.resnet_down is not None)
    return len(stage.resnets) + len(stage.downsamplers) + halved


def taken_maps(stage: UpStage) -> int:
    """How many maps a stage on the way up takes."""
    return len(stage.resnets)


def _resnet_options(c: SimpleNamespace, kind: str) -> dict[str, Any]:
    if kind not in _RESAMPLING:
        return {}
    return {"scale": c.resnet_out_scale_factor, "activated_time": not c.resnet_skip_time_act}


def _skip_options(in_channels: int, channels: int, resample: str | None = None) -> dict[str, Any]:
    groups = (min(in_channels // 4, 32), min(channels // 4, 32))
    return {"scale": math.sqrt(2.0), "groups": groups, "resample": resample, "smooth": resample is not None}


def _attentions(c: SimpleNamespace, kind: str, stage: int, index: int, layers: int) -> list[nn.Module]:
    """The attention blocks of a stage: none, plain, or transformers. index: the stage's place on its way."""
    channels = c.block_out_channels[stage]
    # The library reads this list in the order of the way down on the way up too.
    head_dim = c.attention_head_dim[index] or channels
    if kind.startswith("AttnSkip"):
        scale = math.sqrt(2.0)
        options = {"head_dim": head_dim, "groups": 32, "eps": c.norm_eps, "scale": scale}
        return [SpatialAttention(channels, **options) for _ in range(layers)]
    if kind.startswith("Attn"):
        options = {"head_dim": head_dim, "groups": c.norm_num_groups, "eps": c.norm_eps}
        return [SpatialAttention(channels, **options) for _ in range(layers)]
    middle = kind.startswith("UNetMid")
    if "SimpleCrossAttn" in kind:
        only_text = c.mid_block_only_cross_attention if middle else c.only_cross_attention[stage]
        options = {"head_dim": head_dim, "groups": c.norm_num_groups, "text_channels": c.cross_attention_dim[stage]}
        options |= {"only_text": only_text, "text_norm": c.cross_attention_norm}
        return [AddedAttention(channels, **options) for _ in range(layers)]
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
            crossed_first=c.only_cross_attention[stage] and not middle,
            gated=c.attention_type != "default",
        )
        for depth in spread(depths, layers)
    ]
