"""The U-Net's convolutional parts: the residual block, resampling, and the stages that string them together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.models.context import Context
from fastdiff.models.leaf import is_plain
from fastdiff.models.maps import Map, normed, summed, total
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
    x: (N, in_channels, H, W), or with `skip` the first of those channels, of which skip has the rest. Result
    (N, out_channels, H', W'), which may be given as a `Sum`.
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
        projected = out_channels * (2 if self.scale_shift else 1)
        times = settings.time_channels
        self.time_emb_proj = None if times is None else nn.Linear(times, projected)
        self.norm2 = GroupNormSiLU(settings.groups, out_channels, eps=settings.eps, silu=not self.scale_shift)
        self.dropout = nn.Dropout(settings.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Map, context: Context, skip: Tensor | None = None, size: torch.Size | None = None) -> Map:
        if skip is not None:
            x = torch.cat([total(x), skip], dim=1)
        h, x = normed(self.norm1, x, context), total(x)
        if self.resample is not None:
            h, x = (_halve(h), _halve(x)) if self.resample == "down" else (_double(h, size), _double(x, size))
        folded = self._folds_bias(context)
        h = _without_bias(self.conv1, h) if folded else self.conv1(h)
        h = self._normed_with_time(h, self.conv1.bias if folded else None, context)
        h = self.conv2(self.dropout(h))
        x = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return summed(x, h, self.scale, context)

    def project(self, time: Tensor | None, context: Context) -> Tensor | None:
        """The time (N, time_channels) as norm2 takes it: what is added before it, or with scale_shift [a, b]."""
        if self.time_emb_proj is None or time is None:
            return None
        projected = self.time_emb_proj(time)
        return projected if self.scale_shift or not self._folds_bias(context) else projected + self.conv1.bias

    def _folds_bias(self, context: Context) -> bool:
        return context.rewrites.folded_bias and self.conv1.bias is not None and is_plain(self.conv1)

    def _normed_with_time(self, h: Tensor, bias: Tensor | None, context: Context) -> Tensor:
        """silu(norm2(h + bias + time)); bias is that of conv1 where h has come without it."""
        time = self.project(context.time, context) if context.projected is None else context.projected[self]
        addend = None if bias is None else bias.expand(len(h), -1)
        if time is not None and not self.scale_shift:
            addend = time
        if addend is not None and not context.rewrites.folded_bias:
            h, addend = h + addend[:, :, None, None], None
        h = normed(self.norm2, h, context, addend=addend)
        if self.scale_shift and time is not None:
            a, b = time[:, :, None, None].chunk(2, dim=1)
            h = F.silu(h * (1 + a) + b)
        return h


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2; padding 0 stands for one row and column of zeros at the end only."""

    def __init__(self, channels: int, *, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Map, context: Context) -> Tensor:
        x = total(x)
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to `size` (None: double), then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Map, context: Context, size: torch.Size | None = None) -> Tensor:
        return self.conv(_double(total(x), size))


def _without_bias(conv: nn.Conv2d, x: Tensor) -> Tensor:
    # The layer's own function, since a padding mode or a dilation may have been set on it.
    return conv._conv_forward(x, conv.weight, None)


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

    def _layer(self, index: int, x: Map, context: Context, skip: Tensor | None = None) -> Map:
        x = self.resnets[index](x, context, skip)
        return self.attentions[index](x, context) if self.attentions else x


class DownStage(_Stage):
    """One resolution on the way down; gives its output and the output of each of its layers, for the way up."""

    def __init__(
        self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module], downsampler: nn.Module | None
    ) -> None:
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, x: Map, context: Context) -> tuple[Map, list[Map]]:
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

    def forward(self, x: Map, context: Context) -> Map:
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

    def forward(self, x: Map, skips: list[Map], context: Context, size: torch.Size | None) -> Map:
        for index, skip in enumerate(reversed(skips)):
            x = self._layer(index, x, context, total(skip))
        for upsampler in self.upsamplers:
            x = upsampler(x, context, size=size)
        return x
