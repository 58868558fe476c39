"""The fused layers as modules, for any network. Their parameters are named as diffusers names them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.ops.checks import MAX_HEAD_DIM


class GroupNormSiLU(nn.Module):
    """silu(group_norm(x + addend[n, c] + residual)), or without the silu: `fastdiff.ops.group_norm_silu`.

    x: (N, C, *spatial), contiguous or channels-last, which the result keeps. Parameters: weight, bias (C,), as in
    torch.nn.GroupNorm.
    """

    def __init__(self, groups: int, channels: int, *, eps: float = 1e-5, silu: bool = True) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise InputError(f"GroupNormSiLU: channels={channels} is not divisible by groups={groups}")
        self.groups, self.eps, self.silu = groups, eps, silu
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(
        self, x: Tensor, *, addend: Tensor | None = None, residual: Tensor | None = None, return_sum: bool = False
    ) -> Any:
        return ops.group_norm_silu(
            x,
            self.groups,
            self.weight,
            self.bias,
            eps=self.eps,
            silu=self.silu,
            addend=addend,
            residual=residual,
            return_sum=return_sum,
        )

    def extra_repr(self) -> str:
        return f"{self.groups}, {len(self.weight)}, eps={self.eps}, silu={self.silu}"


class Attention(nn.Module):
    """W_out softmax(q k^T / sqrt(head_dim) + mask) v with q = W_q x and k, v = W_k, W_v of the context.

    x: (B, L, channels); context: (B, S, context_channels), or None for self-attention; mask: broadcastable to
    (B, heads, L, S), bool (True = attend) or floating (added). Result (B, L, channels).
    bias: whether W_q, W_k and W_v have one; W_out always has. Source: Vaswani et al. 2017, section 3.2.2.
    """

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_dim: int,
        context_channels: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        source = channels if context_channels is None else context_channels
        # The operator stops at MAX_HEAD_DIM; one head over 512 channels occurs in early pixel models.
        self._attend = ops.attention if head_dim <= MAX_HEAD_DIM else _plain_attention
        self.heads = heads
        self.to_q = nn.Linear(channels, inner, bias=bias)
        self.to_k = nn.Linear(source, inner, bias=bias)
        self.to_v = nn.Linear(source, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x: Tensor, context: Tensor | None = None, *, mask: Tensor | None = None) -> Tensor:
        source = x if context is None else context
        q, k, v = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in (self.to_q(x), self.to_k(source), self.to_v(source))
        )
        joined = self._attend(q, k, v, mask=mask).transpose(1, 2).flatten(2)
        return self.to_out[0](joined)


class GEGLU(nn.Module):
    """a * gelu(b) with [a, b] = W x + bias; (..., channels) -> (..., hidden).

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


def _plain_attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
