"""The transformer over the pixels of a feature map, with cross-attention."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.models.attention import PackedAttention, added, adds, is_plain_norm, to_map, to_tokens
from fastdiff.models.caches import Cache
from fastdiff.models.context import Context
from fastdiff.models.leaf import is_plain
from fastdiff.models.maps import Map, Sum, normed, scaled, settled, total
from fastdiff.models.packs import Packs
from fastdiff.models.prepacked import apply, products, takes
from fastdiff.nn import GEGLU, GroupNormSiLU

__all__ = ["FeedForward", "Fuser", "Transformer", "TransformerBlock", "add_and_norm"]


class FeedForward(nn.Module):
    """W (GEGLU x) + b, with four times as many hidden channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The library's place 1 is a dropout, always zero in a U-Net; the place keeps the parameters' names.
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return apply(self.net[2], self.hidden(x, context), context.packs)

    def hidden(self, x: Tensor, context: Context) -> Tensor:
        """GEGLU x, what the last layer projects."""
        if context.rewrites.geglu:
            return ops.geglu(apply(self.net[0].proj, x, context.packs))  # type: ignore[arg-type]
        value, gate = apply(self.net[0].proj, x, context.packs).chunk(2, dim=-1)  # type: ignore[arg-type]
        return value * F.gelu(gate)


class TransformerBlock(nn.Module):
    """x += self-attention(norm1 x); x += cross-attention(norm2 x, tokens); x += feed-forward(norm3 x).

    crossed_first: the first attention reads the tokens too (the library's only_cross_attention). gated: between the two
    attentions is a `Fuser`, which objects go through.
    forward(x, residual, context) takes and gives a sum that is still to be made, (x, residual): the norm that reads it
    next makes it. A residual of None stands for zero.
    """

    def __init__(
        self, channels: int, *, heads: int, context_channels: int, crossed_first: bool, gated: bool = False
    ) -> None:
        super().__init__()
        head_dim = channels // heads
        self.crossed_first = crossed_first
        self.norm1 = nn.LayerNorm(channels)
        first_source = context_channels if crossed_first else None
        self.attn1 = PackedAttention(channels, heads=heads, head_dim=head_dim, context_channels=first_source)
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = PackedAttention(channels, heads=heads, head_dim=head_dim, context_channels=context_channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels)
        self.fuser = Fuser(channels, heads=heads, object_channels=context_channels) if gated else None

    def forward(self, x: Tensor, residual: Tensor | None, context: Context) -> tuple[Tensor, Tensor | None]:
        x, h = self.before_last(x, residual, context)
        return onto(x, self.ff.net[2], h, context)

    def before_last(self, x: Tensor, residual: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """What the last layer's product is added to, of which nobody else knows, and what it projects."""
        h, x = add_and_norm(self.norm1, x, residual, context)
        h = self.attn1.attended(h, context, context.tokens if self.crossed_first else None, context.mask)
        x, first = self._onto(x, self.attn1, h, context)
        if self.fuser is not None and context.objects is not None and self.fuser.enabled:
            x, first = self.fuser(x if first is None else first + x, context)
        h, x = add_and_norm(self.norm2, x, first, context)
        h = self.attn2.attended(h, context, context.tokens, context.token_mask)
        x, second = self._onto(x, self.attn2, h, context)
        h, x = add_and_norm(self.norm3, x, second, context)
        return x, self.ff.hidden(h, context)

    def _onto(self, x: Tensor, attention: PackedAttention, h: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
        if not context.rewrites.unit_scale:
            return x, scaled(apply(attention.to_out[0], h, context.packs), 1.0, context)
        return onto(x, attention.to_out[0], h, context)


class Fuser(nn.Module):
    """x += tanh(alpha_attn) attention(norm1 [x, W objects]); x += tanh(alpha_dense) feed-forward(norm2 x).

    forward(x, context) gives the sum that is still to be made, (x, residual). enabled: whether the objects are looked
    at, which callers change from step to step.
    Source: Li et al., "GLIGEN: Open-Set Grounded Text-to-Image Generation", 2023, section 3.
    """

    def __init__(self, channels: int, *, heads: int, object_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(object_channels, channels)
        self.attn = PackedAttention(channels, heads=heads, head_dim=channels // heads)
        self.ff = FeedForward(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.alpha_attn = nn.Parameter(torch.tensor(0.0))
        self.alpha_dense = nn.Parameter(torch.tensor(0.0))
        self.enabled = True

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        assert context.objects is not None
        # Attention reads keys of one tensor; of pixels and objects, joined before the norm and the product.
        seen = torch.cat([x, apply(self.linear, context.objects, context.packs)], dim=1)
        attended = self.attn(self.norm1(seen), context)[:, : x.shape[1]]
        h, x = add_and_norm(self.norm2, x, self.alpha_attn.tanh() * attended, context)
        return x, self.alpha_dense.tanh() * self.ff(h, context)


class Transformer(nn.Module):
    """x + proj_out(blocks(proj_in(group_norm(x)))) over the pixels of x (N, C, H, W).

    linear: whether the projections' weights are stored as (C, C) or as those of 1x1 convolutions (C, C, 1, 1). Between
    them are heads * (channels // heads) channels.
    The result may be given as a `Sum`.
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
        gated: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        inner = channels // heads * heads
        self.norm = GroupNormSiLU(groups, channels, eps=1e-6, silu=False)
        self.proj_in = nn.Linear(channels, inner) if linear else nn.Conv2d(channels, inner, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(
                inner, heads=heads, context_channels=context_channels, crossed_first=crossed_first, gated=gated
            )
            for _ in range(layers)
        )
        self.proj_out = nn.Linear(inner, channels) if linear else nn.Conv2d(inner, channels, 1)
        self._bias = Cache(1)

    def forward(self, x: Map, context: Context) -> Map:
        h, x = normed(self.norm, x, context), total(x)
        tokens, residual = self._project(self.proj_in, to_tokens(h), x, context), None
        *blocks, last = self.transformer_blocks
        for block in blocks:
            tokens, residual = block(tokens, residual, context)
        tokens, h = last.before_last(tokens, residual, context)  # type: ignore[operator]
        layer: Any = last.ff.net[2]  # type: ignore[union-attr, index]
        if self._absorbs(layer, tokens, h, context):
            return self._sum(x, to_map(self._absorbing(layer, tokens, h), x), context)
        tokens, residual = onto(tokens, layer, h, context)
        tokens = tokens if residual is None else tokens + residual
        if context.rewrites.folded_residual and adds(x, self.proj_out, tokens, context):
            return added(x, self.proj_out, tokens, context)
        return self._sum(x, to_map(self._project(self.proj_out, tokens, x, context), x), context)

    def _sum(self, x: Tensor, out: Tensor, context: Context) -> Map:
        return Sum(x, out) if context.rewrites.folded_residual else x + out

    def _absorbs(self, last: nn.Module, tokens: Tensor, h: Tensor, context: Context) -> bool:
        """Whether the last block's sum is made by the product itself, whose bias proj_out's takes in."""
        if not context.rewrites.add_layer_norm or not (is_plain(last) and is_plain(self.proj_out)):
            return False
        weights = [last.weight, last.bias, self.proj_out.weight, self.proj_out.bias]
        if any(weight is None or weight.dtype != tokens.dtype for weight in weights) or h.dtype != tokens.dtype:
            return False
        return not takes((last,), h, context.packs) and settled(tokens, h, *weights)  # type: ignore[arg-type]

    def _absorbing(self, last: nn.Linear, tokens: Tensor, h: Tensor) -> Tensor:
        """proj_out(tokens + last(h)) = W (tokens + W_last h) + (W b_last + b)."""
        weight, own = self.proj_out.weight.flatten(1), self.proj_out.bias
        assert own is not None
        bias = self._bias.get(
            None,
            [self.proj_out.weight, own, last.bias],
            lambda: (weight.double() @ last.bias.double() + own.double()).to(own.dtype),
        )
        summed = tokens.flatten(0, 1).addmm_(h.flatten(0, 1), last.weight.t())
        return F.linear(summed, weight, bias).unflatten(0, tokens.shape[:2])

    def _project(self, layer: nn.Module, tokens: Tensor, like: Tensor, context: Context) -> Tensor:
        if context.packs is not None and takes((layer,), tokens, context.packs):
            return products((layer,), tokens, context.packs)
        if is_plain(layer):
            # A 1x1 convolution is a linear layer: applied to tokens it needs no change of layout.
            return F.linear(tokens, layer.weight.flatten(1), layer.bias)  # type: ignore[arg-type, operator]
        return layer(tokens) if self.linear else to_tokens(layer(to_map(tokens, like)))


def add_and_norm(norm: nn.Module, x: Tensor, residual: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
    """(norm(h), h) with h = x + residual, or x without a residual; x (N, L, C)."""
    if residual is None:
        return norm(x), x
    # Under autocast the two may differ in dtype.
    if context.rewrites.add_layer_norm and is_plain_norm(norm) and residual.dtype == x.dtype:
        return ops.layer_norm_modulate(x, norm.weight, norm.bias, eps=norm.eps, residual=residual, return_sum=True)
    x = residual + x
    return norm(x), x


def onto(x: Tensor, layer: nn.Module, h: Tensor, context: Context) -> tuple[Tensor, Tensor | None]:
    """(x, layer(h)), a sum that is still to be made, or (x + layer(h), None) where the product adds x as it writes."""
    if context.rewrites.add_layer_norm and takes((layer,), h, context.packs) and x.dtype == h.dtype:
        return products((layer,), h, cast(Packs, context.packs), addend=x), None
    return x, apply(layer, h, context.packs)
