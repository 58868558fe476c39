"""Embeddings of the time, the class and the picture's size: a few features per sample, then two linear layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.errors import InputError
from fastdiff.models.packs import Packs
from fastdiff.models.prepacked import products, takes

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu": F.gelu,
    "mish": F.mish,
    "relu": F.relu,
}


class Sinusoids(nn.Module):
    """[sin(t w_k), cos(t w_k)] with w_k = 10000^(-k / (channels/2 - shift)), k < channels/2; cosines first if flip.

    t (N,) -> (N, channels) float32. Source: Ho et al. 2020, after Vaswani et al. 2017, section 3.5.
    """

    def __init__(self, channels: int, *, flip: bool, shift: float) -> None:
        super().__init__()
        if channels < 2 or channels // 2 == shift:
            raise InputError(f"UNet: a time embedding of {channels} channels does not go with freq_shift={shift}")
        self.channels, self.flip, self.shift = channels, flip, shift

    def forward(self, t: Tensor) -> Tensor:
        half = self.channels // 2
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - self.shift)
        angle = t[:, None].float() * torch.exp(exponent)
        parts = (angle.cos(), angle.sin()) if self.flip else (angle.sin(), angle.cos())
        return F.pad(torch.cat(parts, dim=-1), (0, self.channels % 2))


class FourierFeatures(nn.Module):
    """[sin(2 pi w_k t), cos(2 pi w_k t)] with fixed random w_k; of log t if log; cosines first if flip.

    t (N,) -> (N, 2 * size). Source: Tancik et al. 2020; Song et al., "Score-Based Generative Modeling", 2021.
    """

    def __init__(self, size: int, *, scale: float, log: bool, flip: bool) -> None:
        super().__init__()
        self.log, self.flip = log, flip
        self.weight = nn.Parameter(torch.randn(size) * scale, requires_grad=False)

    def forward(self, t: Tensor) -> Tensor:
        t = torch.log(t) if self.log else t
        angle = t[:, None] * self.weight * (2 * math.pi)
        parts = (angle.cos(), angle.sin()) if self.flip else (angle.sin(), angle.cos())
        return torch.cat(parts, dim=-1)


class LearnedTimes(nn.Embedding):
    """Row t of a table, for whole t: (N,) -> (N, channels)."""

    def forward(self, t: Tensor) -> Tensor:
        return super().forward(t.long())


class EmbeddingMLP(nn.Module):
    """post_act(W2 act(W1 (x + Wc condition) + b1) + b2); (N, in_channels) -> (N, channels)."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        act: str = "silu",
        condition_channels: int | None = None,
        post_act: str | None = None,
    ) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_channels, channels)
        self.linear_2 = nn.Linear(channels, channels)
        if condition_channels is not None:
            self.cond_proj = nn.Linear(condition_channels, in_channels, bias=False)
        self.act = ACTIVATIONS[act]
        self.post_act = None if post_act is None else ACTIVATIONS[post_act]

    def forward(self, x: Tensor, condition: Tensor | None = None, packs: Packs | None = None) -> Tensor:
        """packs: where the layers' weights are laid out for these calls, if anywhere."""
        if condition is not None:
            x = x + self.cond_proj(condition)
        x = _linear(self.linear_2, self.act(_linear(self.linear_1, x, packs)), packs)
        return x if self.post_act is None else self.post_act(x)


def _linear(layer: nn.Module, x: Tensor, packs: Packs | None) -> Tensor:
    rows = x[None]
    if packs is not None and takes((layer,), rows, packs):
        return products((layer,), rows, packs)[0]
    y: Tensor = layer(x)
    return y


def class_embedding(c: SimpleNamespace, features: int, channels: int) -> nn.Module | None:
    """The module that a configuration asks for; what it gives has `channels`."""
    if c.class_embed_type == "timestep":
        return EmbeddingMLP(features, channels, act=c.class_act_fn)
    if c.class_embed_type == "identity":
        return nn.Identity()
    if c.class_embed_type == "projection":
        return EmbeddingMLP(c.projection_class_embeddings_input_dim, channels)
    if c.class_embed_type == "simple_projection":
        return nn.Linear(c.projection_class_embeddings_input_dim, channels)
    return None if c.num_class_embeds is None else nn.Embedding(c.num_class_embeds, channels)
