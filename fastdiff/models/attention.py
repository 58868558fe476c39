"""Attention over the pixels of a feature map: the plain block, and the transformer with cross-attention."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.models.context import Context
from fastdiff.models.maps import Map, normed, scaled, total
from fastdiff.nn import GEGLU, Attention, GroupNormSiLU


def to_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H*W, C); nothing is copied, and channels-last gives a contiguous result."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(N, H*W, C) -> (N, C, H, W) of the given map's size; nothing is copied."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


class SpatialAttention(Attention):
    """x + attention(group_norm(x)) over the pixels of x (N, C, H, W); divided by `scale` if it is not 1."""

    def __init__(
        self, channels: int, *, head_dim: int, groups: int | None, eps: float = 1e-5, scale: float = 1.0
    ) -> None:
        super().__init__(channels, heads=channels // head_dim, head_dim=head_dim, bias=True)
        self.group_norm = None if groups is None else GroupNormSiLU(groups, channels, eps=eps, silu=False)
        self.scale = scale

    def forward(self, x: Map, context: Context) -> Tensor:  # type: ignore[override]
        h = total(x) if self.group_norm is None else normed(self.group_norm, x, context)
        x = total(x)
        return scaled(x + to_map(super().forward(to_tokens(h)), x), self.scale, context)


class FeedForward(nn.Module):
    """W (GEGLU x) + b, with four times as many hidden channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The library's place 1 is a dropout, always zero in a U-Net; the place keeps the parameters' names.
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """x += self-attention(norm1 x); x += cross-attention(norm2 x, tokens); x += feed-forward(norm3 x).

    crossed_first: the first attention reads the tokens too (the library's only_cross_attention).
    """

    def __init__(self, channels: int, *, heads: int, context_channels: int, crossed_first: bool) -> None:
        super().__init__()
        head_dim = channels // heads
        self.crossed_first = crossed_first
        self.norm1 = nn.LayerNorm(channels)
        first_source = context_channels if crossed_first else None
        self.attn1 = Attention(channels, heads=heads, head_dim=head_dim, context_channels=first_source)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = Attention(channels, heads=heads, head_dim=head_dim, context_channels=context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        first = self.attn1(self.norm1(x), context.tokens if self.crossed_first else None, mask=context.mask)
        x = x + scaled(first, 1.0, context)
        x = x + scaled(self.attn2(self.norm2(x), context.tokens, mask=context.token_mask), 1.0, context)
        return x + self.ff(self.norm3(x))


class Transformer(nn.Module):
    """x + proj_out(blocks(proj_in(group_norm(x)))) over the pixels of x (N, C, H, W).

    linear: whether the projections' weights are stored as (C, C) or as those of 1x1 convolutions (C, C, 1, 1).
    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, section 3.3.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        layers: int,
        context_channels: int,
        groups: int,
        linear: bool,
        crossed_first: bool,
    ) -> None:
        super().__init__()
        self.norm = GroupNormSiLU(groups, channels, eps=1e-6, silu=False)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads=heads, context_channels=context_channels, crossed_first=crossed_first)
            for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Map, context: Context) -> Tensor:
        tokens = _project(self.proj_in, to_tokens(normed(self.norm, x, context)))
        x = total(x)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + to_map(_project(self.proj_out, tokens), x)


def _project(layer: nn.Linear | nn.Conv2d, tokens: Tensor) -> Tensor:
    # A 1x1 convolution is a linear layer: applied to tokens it needs no change of layout.
    return F.linear(tokens, layer.weight.flatten(1), layer.bias)
