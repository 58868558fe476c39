"""What the time and the class do to a transformer: shifts, scales and gates, and the norms that take them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.models.attention import is_plain_norm
from fastdiff.models.context import Context
from fastdiff.models.embeddings import EmbeddingMLP
from fastdiff.models.leaf import is_plain

__all__ = ["FIXED_EPS", "TIME_FEATURES", "AdaptiveNorm", "Pending", "modulated"]

TIME_FEATURES = 256
FIXED_EPS = 1e-6
"""Of the norms that the configuration's norm_eps does not reach."""
_LABEL_DROPOUT = 0.1


class Pending(NamedTuple):
    """gate * value, (N, C) times (N, L, C): what is still to be added to a sequence."""

    gate: Tensor
    value: Tensor


def modulated(
    norm: nn.Module, x: Tensor, pending: Pending | None, shift: Tensor, scale: Tensor, context: Context
) -> tuple[Tensor, Tensor]:
    """(norm(h) (1 + scale) + shift, h) with h = x + what is pending; x (N, L, C), shift and scale (N, C)."""
    if context.rewrites.add_layer_norm and is_plain_norm(norm) and (pending is None or pending.value.dtype == x.dtype):
        more: dict[str, Any] = {"scale": scale, "shift": shift, "eps": norm.eps}
        if pending is None:
            return ops.layer_norm_modulate(x, norm.weight, norm.bias, **more), x
        more |= {"residual": pending.value, "gate": pending.gate, "return_sum": True}
        return ops.layer_norm_modulate(x, norm.weight, norm.bias, **more)
    if pending is not None:
        x = pending.gate[:, None] * pending.value + x
    return norm(x) * (1 + scale[:, None]) + shift[:, None], x


class AdaptiveNorm(nn.Module):
    """A norm without weights and, from the time and the class, the modulation of the block that begins with it."""

    def __init__(self, channels: int, *, classes: int) -> None:
        super().__init__()
        self.emb = TimeAndClass(channels, classes=classes)
        self.linear = nn.Linear(channels, 6 * channels)
        self.norm = nn.LayerNorm(channels, eps=FIXED_EPS, elementwise_affine=False)

    def modulation(self, features: Tensor, labels: Tensor) -> Tensor:
        """W silu(embedding) + b: (..., 6 channels)."""
        out: Tensor = self.linear(F.silu(self.emb(features, labels)))
        return out

    def weights(self) -> list[Tensor] | None:
        """All that a modulation is made of besides time and class; None where a layer is not plain."""
        embedder, table = self.emb.timestep_embedder, self.emb.class_embedder.embedding_table
        layers = (embedder.linear_1, embedder.linear_2, self.linear)
        if not (all(map(is_plain, layers)) and _is_plain_table(table)):
            return None
        return [weight for layer in (*layers, table) for weight in layer._parameters.values() if weight is not None]


class TimeAndClass(nn.Module):
    """MLP(features of the time) + row of the class: features (N, 256) or (steps, 1, 256), labels (N,)."""

    def __init__(self, channels: int, *, classes: int) -> None:
        super().__init__()
        self.timestep_embedder = EmbeddingMLP(TIME_FEATURES, channels)
        self.class_embedder = ClassTable(channels, classes=classes)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        embedded: Tensor = self.timestep_embedder(features) + self.class_embedder(labels)
        return embedded


class ClassTable(nn.Module):
    """A row for each class and one, the last, for none, which in training stands in for a tenth of the labels.

    Source: Ho and Salimans, "Classifier-Free Diffusion Guidance", 2022, algorithm 1.
    """

    def __init__(self, channels: int, *, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.embedding_table = nn.Embedding(classes + 1, channels)

    def forward(self, labels: Tensor) -> Tensor:
        if self.training:
            dropped = torch.rand(len(labels), device=labels.device) < _LABEL_DROPOUT
            labels = torch.where(dropped, self.classes, labels)
        rows: Tensor = self.embedding_table(labels)
        return rows


def _is_plain_table(layer: nn.Embedding) -> bool:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) is nn.Embedding and not hooked and layer.max_norm is None
