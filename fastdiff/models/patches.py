"""Patches of a picture as tokens, with their places."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdiff.models.attention import to_tokens
from fastdiff.models.caches import Cache

__all__ = ["PatchEmbedding", "positions"]


class PatchEmbedding(nn.Module):
    """W x_patch + b + position of each patch: (N, in_channels, H, W) -> (N, H/patch * W/patch, channels)."""

    def __init__(self, in_channels: int, channels: int, *, patch: int, size: int) -> None:
        super().__init__()
        self.grid = size // patch
        self.proj = nn.Conv2d(in_channels, channels, patch, stride=patch)
        own = positions(self.grid, self.grid, self.grid, channels)
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", own[None], persistent=False)
        self._others = Cache(size=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        rows, columns = x.shape[2:]
        where = self.pos_embed
        if (rows, columns) != (self.grid, self.grid):
            key = (type(x), x.device, rows, columns)
            where = self._others.get(
                key, [], lambda: positions(rows, columns, self.grid, x.shape[1], device=x.device)[None]
            )
        return (to_tokens(x) + where).to(x.dtype)


def positions(rows: int, columns: int, base: int, channels: int, device: torch.device | None = None) -> Tensor:
    """[sin(u w), cos(u w), sin(v w), cos(v w)] for a patch at column u, row v, with w_k = 10000^(-k / (channels/4)).

    A side counts as `base` patches long, however many it has. Result (rows * columns, channels) float32.
    Source: Vaswani et al. 2017, section 3.5, for two dimensions as in Dosovitskiy et al. 2021, appendix D.4.
    """
    quarter = channels // 4
    frequency = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    # The library makes the places in float32, and its networks have been trained with them.
    v, u = (torch.arange(count, dtype=torch.float32, device=device) / (count / base) for count in (rows, columns))
    parts = []
    for place in (u.repeat(rows), v.repeat_interleave(columns)):
        angle = place.double()[:, None] * frequency
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()
