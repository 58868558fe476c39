"""Attention over the pixels of a feature map."""

from __future__ import annotations

from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn

from fastdiff.models import packing
from fastdiff.models.caches import Cache
from fastdiff.models.context import Context
from fastdiff.models.leaf import is_plain
from fastdiff.models.maps import Map, folds, normed, summed, total
from fastdiff.models.packs import Packs
from fastdiff.models.prepacked import apply, products, takes
from fastdiff.nn import Attention, GroupNormSiLU

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
        self.fits_pixels = context_channels in (None, channels)
        self.norm_cross: nn.Module | None = None
        self.text = Cache(size=PROMPTS)

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Context, tokens: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        attended = self.attended(x, context, tokens, mask)
        for layer in self.to_out:
            attended = apply(layer, attended, context.packs)
        return attended

    def attended(self, x: Tensor, context: Context, tokens: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """What `to_out` projects, (B, L, heads * head_dim)."""
        if tokens is None:
            q, k, v = products_of((self.to_q, self.to_k, self.to_v), x, context, context.packs)
        else:
            q = apply(self.to_q, x, context.packs)
            k, v = self.of_text((self.to_k, self.to_v), tokens, context, x.requires_grad)
        return self.joined(q, k, v, mask)

    def pack(self) -> None:
        """Lays the projections' parameters side by side now instead of at the first call, where they can be."""
        for leaves in self._packs():
            packing.pack(leaves)

    def unpack(self) -> None:
        """Gives the projections' parameters memory of their own again."""
        for leaves in self._packs():
            packing.unpack(leaves)

    def _packs(self) -> tuple[tuple[nn.Module, ...], ...]:
        return (self.to_q, self.to_k, self.to_v), (self.to_k, self.to_v)

    def of_text(
        self, leaves: tuple[nn.Module, ...], tokens: Tensor, context: Context, differentiated: bool
    ) -> tuple[Tensor, ...]:
        """The layers' products with the text, or with norm_cross of it; computed once for a text where they can be."""
        norm = self.norm_cross
        plain = norm is None or is_plain_norm(norm) or type(norm) is GroupNormSiLU
        if not (context.rewrites.text_cache and plain and all(map(is_plain, leaves))):
            return products_of(leaves, self._normed_text(tokens), context, context.packs)
        made_of: list[Any] = [tokens, *(w for leaf in leaves for w in (leaf.weight, leaf.bias) if w is not None)]
        if norm is not None:
            made_of += norm.parameters()
        if torch.is_grad_enabled() and (differentiated or any(tensor.requires_grad for tensor in made_of)):
            return products_of(leaves, self._normed_text(tokens), context, None)
        kind = tokens.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        # Once for a text, these are not worth a copy of the weights.
        return self.text.get(autocast, made_of, lambda: products_of(leaves, self._normed_text(tokens), context, None))

    def _normed_text(self, tokens: Tensor) -> Tensor:
        if isinstance(self.norm_cross, GroupNormSiLU):
            return self.norm_cross(tokens.transpose(1, 2)).transpose(1, 2)
        return tokens if self.norm_cross is None else self.norm_cross(tokens)


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
        x, attended = total(x), self.attended(to_tokens(h), context)
        return projected_onto(x, self.to_out[0], attended, self.scale, context)


def projected_onto(x: Tensor, layer: nn.Module, tokens: Tensor, scale: float, context: Context) -> Map:
    """(x + layer(tokens)) / scale for a map x (N, C, H, W): added by the product, else left to the next norm."""
    if folds(scale, context) and adds(x, layer, tokens, context):
        return added(x, layer, tokens, context)
    return summed(x, to_map(apply(layer, tokens, context.packs), x), scale, context)


def adds(x: Tensor, layer: nn.Module, tokens: Tensor, context: Context) -> bool:
    """Whether the layer's product of the tokens adds the map x as it writes its result."""
    dense = x.is_contiguous(memory_format=torch.channels_last)
    return dense and x.dtype == tokens.dtype and takes((layer,), tokens, context.packs)


def added(x: Tensor, layer: nn.Module, tokens: Tensor, context: Context) -> Tensor:
    """x + layer(tokens), for what `adds` allows."""
    return to_map(products((layer,), tokens, cast(Packs, context.packs), addend=to_tokens(x)), x)


def is_plain_norm(norm: nn.Module) -> TypeGuard[nn.LayerNorm]:
    """Whether calling this layer is LayerNorm with its weight and bias and nothing else."""
    hooked = norm._forward_hooks or norm._forward_pre_hooks or "forward" in vars(norm)
    return type(norm) is nn.LayerNorm and not hooked


def products_of(leaves: tuple[nn.Module, ...], x: Tensor, context: Context, packs: Packs | None) -> tuple[Tensor, ...]:
    """What each of the layers gives for x, as one product where the rewrite of that name is on."""
    return (
        packing.product(leaves, x, packs) if context.rewrites.qkv else tuple(apply(leaf, x, packs) for leaf in leaves)
    )
