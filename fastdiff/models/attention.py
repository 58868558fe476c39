"""Attention over the pixels of a feature map: the plain block, and the transformer with cross-attention."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.models import packing
from fastdiff.models.caches import Cache
from fastdiff.models.context import Context
from fastdiff.models.leaf import is_plain
from fastdiff.models.maps import Map, Sum, normed, scaled, total
from fastdiff.models.prepacked import Packs, apply, products, takes
from fastdiff.nn import GEGLU, Attention, GroupNormSiLU

PROMPTS = 4
"""Texts whose keys and values an attention remembers: a picture's with and without guidance, and those of two runs that
take turns."""


def to_tokens(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, H*W, C); nothing is copied, and channels-last gives a contiguous result."""
    return x.flatten(2).transpose(1, 2)


def to_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(N, H*W, C) -> (N, C, H, W) of the given map's size; nothing is copied."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[2:])


class PackedAttention(Attention):
    """Attention inside a network: what reads the same input is one product, what reads the text is made once per text.

    x (B, L, channels); tokens (B, S, context_channels), or None for self-attention; mask broadcastable to
    (B, heads, L, S). The scores accumulate in float32 whatever the dtype, which is what diffusers' upcast_attention
    asks for: the option changes nothing here.
    """

    def __init__(
        self, channels: int, *, heads: int, head_dim: int, context_channels: int | None = None, bias: bool = False
    ) -> None:
        super().__init__(channels, heads=heads, head_dim=head_dim, context_channels=context_channels, bias=bias)
        self.text = Cache(size=PROMPTS)

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Context, tokens: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        if tokens is None:
            q, k, v = _products((self.to_q, self.to_k, self.to_v), x, context, context.packs)
        else:
            q = apply(self.to_q, x, context.packs)
            k, v = self._keys_and_values(tokens, context, x.requires_grad)
        joined = self.joined(q, k, v, mask)
        for layer in self.to_out:
            joined = apply(layer, joined, context.packs)
        return joined

    def pack(self) -> None:
        """Lays the projections' parameters side by side now instead of at the first call, where they can be."""
        packing.pack((self.to_q, self.to_k, self.to_v))
        packing.pack((self.to_k, self.to_v))

    def unpack(self) -> None:
        """Gives the projections' parameters memory of their own again."""
        packing.unpack((self.to_q, self.to_k, self.to_v))
        packing.unpack((self.to_k, self.to_v))

    def _keys_and_values(self, tokens: Tensor, context: Context, differentiated: bool) -> tuple[Tensor, ...]:
        leaves = (self.to_k, self.to_v)
        if not context.rewrites.text_cache or not all(map(is_plain, leaves)):
            return _products(leaves, tokens, context, context.packs)
        made_of = [tokens, *(value for leaf in leaves for value in (leaf.weight, leaf.bias) if value is not None)]
        if torch.is_grad_enabled() and (differentiated or any(tensor.requires_grad for tensor in made_of)):
            return _products(leaves, tokens, context, None)
        kind = tokens.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # Once for a text, these are not worth a copy of the weights.
        return self.text.get(autocast, made_of, lambda: _products(leaves, tokens, context, None))


class SpatialAttention(PackedAttention):
    """x + attention(group_norm(x)) over the pixels of x (N, C, H, W); divided by `scale` if it is not 1.

    The result may be given as a `Sum`.
    """

    def __init__(
        self, channels: int, *, head_dim: int, groups: int | None, eps: float = 1e-5, scale: float = 1.0
    ) -> None:
        super().__init__(channels, heads=channels // head_dim, head_dim=head_dim, bias=True)
        self.group_norm = None if groups is None else GroupNormSiLU(groups, channels, eps=eps, silu=False)
        self.scale = scale

    def forward(self, x: Map, context: Context) -> Map:  # type: ignore[override]
        h = total(x) if self.group_norm is None else normed(self.group_norm, x, context)
        x = total(x)
        attended = to_map(super().forward(to_tokens(h), context), x)
        if context.rewrites.folded_residual and context.rewrites.unit_scale and self.scale == 1.0:
            return Sum(x, attended)
        return scaled(x + attended, self.scale, context)


class FeedForward(nn.Module):
    """W (GEGLU x) + b, with four times as many hidden channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        # The library's place 1 is a dropout, always zero in a U-Net; the place keeps the parameters' names.
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x: Tensor, context: Context) -> Tensor:
        if context.rewrites.geglu:
            h = ops.geglu(apply(self.net[0].proj, x, context.packs))  # type: ignore[arg-type]
        else:
            value, gate = apply(self.net[0].proj, x, context.packs).chunk(2, dim=-1)  # type: ignore[arg-type]
            h = value * F.gelu(gate)
        return apply(self.net[2], h, context.packs)


class TransformerBlock(nn.Module):
    """x += self-attention(norm1 x); x += cross-attention(norm2 x, tokens); x += feed-forward(norm3 x).

    crossed_first: the first attention reads the tokens too (the library's only_cross_attention).
    forward(x, residual, context) takes and gives a sum that is still to be made, (x, residual): the norm that reads it
    next makes it. A residual of None stands for zero.
    """

    def __init__(self, channels: int, *, heads: int, context_channels: int, crossed_first: bool) -> None:
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

    def forward(self, x: Tensor, residual: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        h, x = add_and_norm(self.norm1, x, residual, context)
        first = self.attn1(h, context, context.tokens if self.crossed_first else None, context.mask)
        h, x = add_and_norm(self.norm2, x, scaled(first, 1.0, context), context)
        second = self.attn2(h, context, context.tokens, context.token_mask)
        h, x = add_and_norm(self.norm3, x, scaled(second, 1.0, context), context)
        return x, self.ff(h, context)


class Transformer(nn.Module):
    """x + proj_out(blocks(proj_in(group_norm(x)))) over the pixels of x (N, C, H, W).

    linear: whether the projections' weights are stored as (C, C) or as those of 1x1 convolutions (C, C, 1, 1).
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
    ) -> None:
        super().__init__()
        self.linear = linear
        self.norm = GroupNormSiLU(groups, channels, eps=1e-6, silu=False)
        self.proj_in = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, heads=heads, context_channels=context_channels, crossed_first=crossed_first)
            for _ in range(layers)
        )
        self.proj_out = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)

    def forward(self, x: Map, context: Context) -> Map:
        h, x = normed(self.norm, x, context), total(x)
        tokens, residual = self._project(self.proj_in, to_tokens(h), x, context), None
        for block in self.transformer_blocks:
            tokens, residual = block(tokens, residual, context)
        if residual is not None:
            tokens = tokens + residual
        out = to_map(self._project(self.proj_out, tokens, x, context), x)
        return Sum(x, out) if context.rewrites.folded_residual else x + out

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


def is_plain_norm(norm: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether calling this layer is LayerNorm with its weight and bias and nothing else."""
    hooked = norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm)
    return type(norm) is nn.LayerNorm and not hooked


def _products(leaves: tuple[nn.Module, ...], x: Tensor, context: Context, packs: Packs | None) -> tuple[Tensor, ...]:
    return (
        packing.product(leaves, x, packs) if context.rewrites.qkv else tuple(apply(leaf, x, packs) for leaf in leaves)
    )
