"""The U-Net's convolutional parts: the residual block, resampling, and the stages that string them together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.models.attention import to_map, to_tokens
from fastdiff.models.caches import Cache
from fastdiff.models.context import Context, Time
from fastdiff.models.embeddings import ACTIVATIONS
from fastdiff.models.filters import filter_down, filter_up
from fastdiff.models.leaf import is_plain
from fastdiff.models.maps import Map, convolved_onto, laid_out, normed, settled, total
from fastdiff.models.prepacked import apply, convolve, convolve_both, convolve_doubled, doubles, takes
from fastdiff.nn import GroupNormSiLU
from fastdiff.ops.reference import memory_format


@dataclass(frozen=True)
class ResnetSettings:
    """What all residual blocks of a network share. time_channels: None for blocks that read no time."""

    time_channels: int | None
    groups: int
    eps: float
    dropout: float
    scale_shift: bool
    act: str = "silu"


class ResnetBlock(nn.Module):
    """shortcut(x) + conv2(dropout(act(norm2(conv1(act(norm1(x))) + time)))), divided by `scale` if it is not 1.

    With scale_shift the time does not enter before norm2: its two halves a, b turn norm2's result n into n (1 + a) + b.
    resample: "down" halves, "up" doubles the picture, both before conv1 and in the shortcut; smooth: as `filters` does
    it, and with a convolution in the shortcut. activated_time: whether the time is read through the activation.
    groups: those of norm1 and norm2 where they are not the settings'.
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
        smooth: bool = False,
        activated_time: bool = True,
        groups: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift, self.scale, self.resample, self.smooth = settings.scale_shift, scale, resample, smooth
        self.activated_time = activated_time
        first, second = groups or (settings.groups, settings.groups)
        silu = settings.act in ("silu", "swish")
        self.act = F.silu if silu else ACTIVATIONS[settings.act]
        self.norm1 = GroupNormSiLU(first, in_channels, eps=settings.eps, silu=silu)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        projected = out_channels * (2 if self.scale_shift else 1)
        times = settings.time_channels
        self.time_emb_proj = None if times is None else nn.Linear(times, projected)
        self.norm2 = GroupNormSiLU(second, out_channels, eps=settings.eps, silu=silu and not self.scale_shift)
        self.dropout = nn.Dropout(settings.dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        own_shortcut = in_channels != out_channels or smooth
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if own_shortcut else None
        self._folded = Cache(1)

    def forward(self, x: Map, context: Context, skip: Tensor | None = None, size: torch.Size | None = None) -> Map:
        x, skip = paired(x, skip, self.conv_shortcut, context)
        h, x = normed(self.norm1, x, context, second=skip), total(x)
        if not self.norm1.silu:
            h = self.act(h)
        bias = not self.folds_bias(context)
        if self.smooth:
            change = filter_up if self.resample == "up" else filter_down
            h, x = (laid_out(change(each), context.rewrites) for each in (h, x))
            h = convolve(self.conv1, h, context.packs, bias=bias)
        elif self.resample == "up":
            h, x = _convolve_doubled(self.conv1, h, self._folded, context, size, bias=bias), _double(x, size, context)
        elif self.resample == "down":
            h, x = convolve(self.conv1, _halve(h), context.packs, bias=bias), _halve(x)
        else:
            h = convolve(self.conv1, h, context.packs, bias=bias)
        h = self._normed_with_time(h, None if bias else self.conv1.bias, context)
        return convolved_onto(
            shortcut(self.conv_shortcut, x, skip, context), self.conv2, self.dropout(h), self.scale, context
        )

    def project(self, time: Time | None, context: Context) -> Tensor | None:
        """The time (N, time_channels) as norm2 takes it: what is added before it, or with scale_shift [a, b]."""
        if self.time_emb_proj is None or time is None:
            return None
        projected: Tensor = self.time_emb_proj(self.time_input(time))
        bias = self.time_addend(context)
        return projected if bias is None else projected + bias

    def time_input(self, time: Time) -> Tensor:
        """What the layer of `project` reads."""
        return time.activated if self.activated_time else time.embedding

    def time_addend(self, context: Context) -> Tensor | None:
        """What `project` adds to what that layer gives."""
        return self.conv1.bias if not self.scale_shift and self.folds_bias(context) else None

    def time_layer(self) -> nn.Module | None:
        """The layer of `project`."""
        return self.time_emb_proj

    def folds_bias(self, context: Context) -> bool:
        """Whether conv1's bias is added where norm2 reads."""
        return context.rewrites.folded_bias and is_plain(self.conv1) and self.conv1.bias is not None

    def _normed_with_time(self, h: Tensor, bias: Tensor | None, context: Context) -> Tensor:
        """silu(norm2(h + bias + time)); bias is that of conv1 where h has come without it."""
        time = self.project(context.time, context) if context.projected is None else context.projected[self]
        if time is not None and not self.scale_shift:
            addend = time
        else:
            addend = None if bias is None else bias.expand(len(h), -1)
        if addend is not None and not context.rewrites.folded_bias:
            h, addend = h + addend[:, :, None, None], None
        h = normed(self.norm2, h, context, addend=addend)
        if self.scale_shift and time is not None:
            a, b = time[:, :, None, None].chunk(2, dim=1)
            h = torch.addcmul(b, h, 1 + a)
        return h if self.norm2.silu else self.act(h)


def paired(x: Map, skip: Tensor | None, conv: nn.Module | None, context: Context) -> tuple[Map, Tensor | None]:
    """x and skip as a block's first norm and `shortcut`, whose layer is conv, take them: apart where both read two."""
    if skip is None or _splits(total(x), skip, conv, context):
        return x, skip
    # Somebody else's layer, or a sum without one, reads one tensor.
    return torch.cat([total(x), skip], dim=1), None


def shortcut(conv: nn.Module | None, x: Tensor, skip: Tensor | None, context: Context) -> Tensor:
    """conv of x and skip as if concatenated along the channels: the sum of two products. Without a conv, x."""
    if conv is None or skip is None:
        return x if conv is None else apply(conv, x, context.packs)
    if context.packs is not None and takes((conv,), x, context.packs, second=skip):
        return convolve_both(conv, x, skip, context.packs)
    weight, bias = cast(Tensor, conv.weight), cast(Tensor | None, conv.bias)
    first, second = weight.split([x.shape[1], skip.shape[1]], dim=1)
    if not x.is_contiguous(memory_format=torch.channels_last):
        return F.conv2d(x, first, bias) + F.conv2d(skip, second)
    tokens = F.linear(to_tokens(x), first.flatten(1), bias)
    # The second product is added as it is made.
    tokens.flatten(0, 1).addmm_(to_tokens(skip).flatten(0, 1), second.flatten(1).t())
    return to_map(tokens, x)


def _splits(x: Tensor, skip: Tensor, conv: nn.Module | None, context: Context) -> bool:
    if not (context.rewrites.split_skip and context.rewrites.group_norm_silu):
        return False
    same = x.dtype == skip.dtype and memory_format(x, skip) == memory_format(skip, x)
    # Autocast would choose another dtype for the product than for what it is added to.
    return conv is not None and is_plain(conv) and same and not torch.is_autocast_enabled(x.device.type)


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2; padding 0 stands for one row and column of zeros at the end only."""

    def __init__(self, channels: int, *, padding: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.padding = padding

    def forward(self, x: Map, context: Context) -> Tensor:
        x = total(x)
        if not self.padding:
            # F.pad gives a single sample another layout.
            x = laid_out(F.pad(x, (0, 1, 0, 1)), context.rewrites)
        return convolve(self.conv, x, context.packs)


class Upsample(nn.Module):
    """Nearest neighbour to `size` (None: double), then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self._folded = Cache(1)

    def forward(self, x: Map, context: Context, size: torch.Size | None = None) -> Tensor:
        return _convolve_doubled(self.conv, total(x), self._folded, context, size)


def _convolve_doubled(
    conv: nn.Conv2d, x: Tensor, folded: Cache, context: Context, size: torch.Size | None, *, bias: bool = True
) -> Tensor:
    """conv(x brought to `size`); folded: where the weight is kept that does both where the size is twice x's."""
    twice = size is None or (size[0] == 2 * x.shape[2] and size[1] == 2 * x.shape[3])
    if not (twice and context.rewrites.upsample_conv and is_plain(conv) and settled(x, conv.weight)):
        return convolve(conv, _double(x, size, context), context.packs, bias=bias)
    if context.packs is not None and doubles(conv, x, context.packs):
        return convolve_doubled(conv, x, context.packs, bias=bias)
    weight = folded.get(None, [conv.weight], lambda: ops.fold_upsample(conv.weight))
    return laid_out(ops.upsample_conv(x, weight, conv.bias if bias else None), context.rewrites)


def _halve(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def _double(x: Tensor, size: torch.Size | None, context: Context) -> Tensor:
    doubled = F.interpolate(x, scale_factor=2.0) if size is None else F.interpolate(x, size=size)
    return laid_out(doubled, context.rewrites)


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
    """One resolution on the way down; gives its output and the output of each of its layers, for the way up.

    residual: added to the last layer's output, of which what comes after it is made.
    """

    def __init__(
        self, resnets: Iterable[nn.Module], attentions: Iterable[nn.Module], downsampler: nn.Module | None
    ) -> None:
        super().__init__(resnets, attentions)
        self.downsamplers = nn.ModuleList([] if downsampler is None else [downsampler])

    def forward(self, x: Map, context: Context, residual: Tensor | None = None) -> tuple[Map, list[Map | None]]:
        skips: list[Map | None] = []
        for index in range(len(self.resnets)):
            x = self._layer(index, x, context)
            skips.append(x)
        if residual is not None:
            x = skips[-1] = total(x) + residual
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

    def forward(self, x: Map, skips: list[Map | None], context: Context, size: torch.Size | None = None) -> Map:
        for index, skip in enumerate(reversed(skips)):
            assert skip is not None
            x = self._layer(index, x, context, total(skip))
        for upsampler in self.upsamplers:
            x = upsampler(x, context, size=size)
        return x
