"""Attention of the pixels to the text and to themselves at once."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from fastdiff.models.attention import PackedAttention, products_of, projected_onto, to_tokens
from fastdiff.models.context import Context
from fastdiff.models.maps import Map, normed, total
from fastdiff.models.prepacked import apply
from fastdiff.nn import GroupNormSiLU

__all__ = ["AddedAttention"]


class AddedAttention(PackedAttention):
    """x + attention(group_norm x; keys and values of the text, then those of the pixels) for x (N, C, H, W).

    only_text: without the keys and values of the pixels. text_norm: "layer_norm" or "group_norm", which the text goes
    through first. The mask is added to the scores of the text, or of the pixels too if it is as long as both.
    Source: Nichol et al., "GLIDE", 2022, section 3, after Dhariwal and Nichol 2021.
    """

    def __init__(
        self, channels: int, *, head_dim: int, groups: int, text_channels: int, only_text: bool, text_norm: str | None
    ) -> None:
        super().__init__(channels, heads=channels // head_dim, head_dim=head_dim, bias=True)
        self.fits_pixels = False
        inner = self.heads * head_dim
        self.group_norm = GroupNormSiLU(groups, channels, silu=False)
        if text_norm == "group_norm":
            self.norm_cross = GroupNormSiLU(32, text_channels, silu=False)
        elif text_norm == "layer_norm":
            self.norm_cross = nn.LayerNorm(channels)
        if only_text:
            self.to_k, self.to_v = None, None  # type: ignore[assignment]
        self.only_text = only_text
        self.add_k_proj = nn.Linear(text_channels, inner)
        self.add_v_proj = nn.Linear(text_channels, inner)

    def forward(self, x: Map, context: Context) -> Map:  # type: ignore[override]
        assert context.tokens is not None
        h = to_tokens(normed(self.group_norm, x, context))
        x = total(x)
        k, v = self.of_text((self.add_k_proj, self.add_v_proj), context.tokens, context, x.requires_grad)
        if self.only_text:
            q = apply(self.to_q, h, context.packs)
        else:
            q, own_k, own_v = products_of((self.to_q, self.to_k, self.to_v), h, context, context.packs)
            # Attention reads the keys of one tensor.
            k, v = torch.cat([k, own_k], dim=1), torch.cat([v, own_v], dim=1)
        mask = context.token_mask if context.mask is None else context.mask
        if mask is not None and mask.shape[-1] != k.shape[1]:
            mask = F.pad(mask, (0, h.shape[1]))
        return projected_onto(x, self.to_out[0], self.joined(q, k, v, mask), 1.0, context)

    def _packs(self) -> tuple[tuple[nn.Module, ...], ...]:
        own = () if self.only_text else ((self.to_q, self.to_k, self.to_v),)
        return (*own, (self.add_k_proj, self.add_v_proj))
