"""The U-Net's convolutional parts: the residual block, resampling, and the stages that string them together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.models.context import Context
from fastdiff.models.maps import scaled
from fastdiff.nn import GroupNormSiLU


@dataclass(frozen=True)
class ResnetSettings:
    """What all residual blocks of a network share. time_channels: None for blocks that read no time."""

    time_channels: int | None
    groups: int
    eps: float
    dropout: float
    scale_shift: bool


class ResnetBlock(nn.Module):
    """shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + time)))), divided by `scale` if it is not 1.

    With scale_shift the time does not enter before norm2: its two halves a, b turn norm2's result n into n (1 + a) + b.
    resample: "down" halves, "up" doubles the picture, both before conv1 and in the shortcut.
    x: (N, in_channels, H, W); time: that of the context, (N, time_channels). Result (N, out_channels, H', W').
    Source: Ho et al. 2020, appendix B; scale_shift and resample: Dhariwal and Nichol 2021, section 3.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        settings: ResnetSettings,
        *,
        scale: float = 1.0,
        resample: str | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.scale, self.resample = settings.scale_shift, scale, resample
        self.norm1 = GroupNormSiLU(settings.groups, in_channels, eps=settings.eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        wide = out_channels * (2 if self.scale_shift else 1)
        self.time_emb_proj = None if settings.time_channels is None else nn.Linear(settings.time_channels, wide)
        self.norm2 = GroupNormSiLU(settings.groups, out_channels, eps=settings.eps, silu=not self.scale_shift)
        self.dropout = nn.Dropout(settings.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, context: Context, size: torch.Size | None = None) -> Tensor:
        h = self.norm1(x)
        if self.resample is not None:
            h, x = (_halve(h), _halve(x)) if self.resample == "down" else (_double(h, size), _double(x, size))
        h = self.conv1(h)
        time = None if self.time_emb_proj is None else self.time_emb_proj(context.time)
        if self.scale_shift and time is not None:
            a, b = time[:, :, None, None].chunk(2, dim=1)
            h = F.silu(self.norm2(h) * (1 + a) + b)
        else:
            h = self.norm2(h, addend=time)
        h = self.conv2(self.dropout(h))
        return scaled((x if self.conv_shortcut is None else self.conv_shortcut(x)) + h, self.scale, context)


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2; padding 0 stands for one row and column of zeros at the end only."""

    def __init__(self, channels: int, *, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to `size` (None: double), then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, context: Context, size: torch.Size | None = None) -> Tensor:
        return self.conv(_double(x, size))


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _double(x: Tensor, size: torch.Size | None) -> Tensor:
    return F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size=size)


class _Stage(nn.Module):
    """Residual blocks, each followed by an attention block if the stage has any."""

    def __init__(self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module]) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)

    def _layer(self, index: int, x: Tensor, context: Context) -> Tensor:
        x = self.resnets[index](x, context)
        return self.attentions[index](x, context) if self.attentions else x


class DownStage(_Stage):
    """One resolution on the way down; gives its output and the output of each of its layers, for the way up."""

    def __init__(
        self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module], downsampler: nn.Module | None
    ) -> None:
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, list[Tensor]]:
        skips = []
        for index in range(len(self.resnets)):
            x = self._layer(index, x, context)
            skips.append(x)
        for downsampler in self.downsamplers:
            x = downsampler(x, context)
            skips.append(x)
        return x, skips


class MidStage(_Stage):
    """The lowest resolution: a residual block, then attention (if any) and residual block in turn."""

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = self.resnets[0](x, context)
        for index, resnet in enumerate(self.resnets[1:]):
            x = resnet(self.attentions[index](x, context) if self.attentions else x, context)
        return x


class UpStage(_Stage):
    """One resolution on the way up: every layer takes one of the stored maps, the latest first, as more channels."""

    def __init__(
        self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module], upsampler: nn.Module | None
    ) -> None:
        super().__init__(resnets, attentions)
        self.upsamplers = nn.ModuleList([] if upsampler is None else [upsampler])

    def forward(self, x: Tensor, skips: list[Tensor], context: Context, size: torch.Size | None) -> Tensor:
        for index, skip in enumerate(reversed(skips)):
            x = self._layer(index, torch.cat([x, skip], dim=1), context)
        for upsampler in self.upsamplers:
            x = upsampler(x, context, size)
        return x
