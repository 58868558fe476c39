"""NCSN++'s stages: the picture goes down and up beside the maps, and into them and out of them at each resolution.

Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021, appendix H.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fastdiff.models.blocks import DownStage, ResnetBlock, UpStage
from fastdiff.models.context import Context
from fastdiff.models.filters import filter_down, filter_up
from fastdiff.models.maps import Map, laid_out, normed, total
from fastdiff.models.prepacked import convolve
from fastdiff.nn import GroupNormSiLU

__all__ = ["PICTURE_CHANNELS", "SkipDownStage", "SkipUpStage"]

PICTURE_CHANNELS = 3


class SkipDownStage(DownStage):
    """A stage whose last map is resnet_down(x) + skip_conv(the picture halved); context.picture is then halved."""

    def __init__(
        self,
        resnets: Iterable[nn.Module],
        attentions: Iterable[nn.Module],
        resnet_down: ResnetBlock | None,
        channels: int,
    ) -> None:
        super().__init__(resnets, attentions, None)
        self.resnet_down = resnet_down
        self.skip_conv = None if resnet_down is None else nn.Conv2d(PICTURE_CHANNELS, channels, 1)

    def forward(self, x: Map, context: Context, residual: Tensor | None = None) -> tuple[Map, list[Map | None]]:
        x, skips = super().forward(x, context, residual)
        if self.resnet_down is not None and self.skip_conv is not None:
            assert context.picture is not None
            context.picture = laid_out(filter_down(context.picture), context.rewrites)
            x = convolve(self.skip_conv, context.picture, context.packs, addend=total(self.resnet_down(x, context)))
            skips.append(x)
        return x, skips


class SkipUpStage(UpStage):
    """A stage that adds skip_conv(act(skip_norm(x))) to the doubled picture before resnet_up doubles x.

    Its one attention block, if it has any, comes after all residual blocks.
    """

    def __init__(
        self,
        resnets: Iterable[nn.Module],
        attentions: Iterable[nn.Module],
        resnet_up: ResnetBlock | None,
        channels: int,
        eps: float,
    ) -> None:
        super().__init__(resnets, attentions, None)
        self.resnet_up = resnet_up
        if resnet_up is not None:
            self.skip_conv = nn.Conv2d(channels, PICTURE_CHANNELS, 3, padding=1)
            self.skip_norm = GroupNormSiLU(min(channels // 4, 32), channels, eps=eps)

    def forward(self, x: Map, skips: list[Map | None], context: Context, size: object = None) -> Map:
        for resnet, skip in zip(self.resnets, reversed(skips), strict=True):
            assert skip is not None
            x = resnet(x, context, total(skip))
        for attention in self.attentions:
            x = attention(x, context)
        if context.picture is not None:
            context.picture = laid_out(filter_up(context.picture), context.rewrites)
        if self.resnet_up is not None:
            h = normed(self.skip_norm, x, context)
            context.picture = convolve(self.skip_conv, h, context.packs, addend=context.picture)
            x = self.resnet_up(x, context)
        return x
