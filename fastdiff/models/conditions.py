"""What a U-Net is told besides the time, from texts and pictures: parts of the time embedding, and tokens to look at.

Source: Saharia et al. 2022 (pooled text); Razzhigaev et al., "Kandinsky", 2023 (texts and pictures).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from fastdiff.models.attention import is_plain_norm
from fastdiff.models.caches import Cache
from fastdiff.models.context import Context
from fastdiff.models.embeddings import EmbeddingMLP
from fastdiff.models.leaf import is_plain
from fastdiff.models.maps import settled
from fastdiff.models.prepacked import apply

__all__ = [
    "ADDED",
    "HINT_CHANNELS",
    "ImageTime",
    "Pooling",
    "TextImageTime",
    "TextTime",
    "added_embedding",
    "made_once",
    "token_projection",
]

ADDED: Mapping[str | None, tuple[str, ...]] = {
    None: (),
    "text": (),
    "text_time": ("text_embeds", "time_ids"),
    "text_image": ("image_embeds",),
    "image": ("image_embeds",),
    "image_hint": ("image_embeds", "hint"),
}
"""What each addition_embed_type has to find in added_cond_kwargs."""

_IMAGE_TOKENS = {"text_image_proj": 10, "image_proj": 32}
"""Tokens that stand for a picture."""
_HINT = ((3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 96, 2), (96, 96, 1), (96, 256, 2), (256, 4, 1))
"""(channels in, channels out, stride) of the convolutions that a hint goes through."""
HINT_CHANNELS = _HINT[-1][1]


class Pooling(nn.Module):
    """The text's tokens (N, S, channels) seen by their mean: attention with that one query, (N, channels)."""

    def __init__(self, channels: int, *, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.positional_embedding = nn.Parameter(torch.randn(1, channels) / channels**0.5)
        self.k_proj = nn.Linear(channels, channels)
        self.q_proj = nn.Linear(channels, channels)
        self.v_proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        mean = tokens.mean(dim=1, keepdim=True) + self.positional_embedding.to(tokens.dtype)
        # Both projections read the mean and the tokens; it is the time's, once for a run.
        tokens = torch.cat([mean, tokens], dim=1)
        projected = (self.q_proj(mean), self.k_proj(tokens), self.v_proj(tokens))
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in projected)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        # The library takes this softmax in float32 even in float64.
        return (scores.float().softmax(dim=-1).to(v.dtype) @ v).flatten(1)


class TextTime(nn.Module):
    """norm2(proj(pool(norm1 tokens))): (N, S, text_channels) -> (N, channels)."""

    def __init__(self, text_channels: int, channels: int, *, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(text_channels)
        self.pool = Pooling(text_channels, heads=heads)
        self.proj = nn.Linear(text_channels, channels)
        self.norm2 = nn.LayerNorm(channels)

    def forward(self, tokens: Tensor) -> Tensor:
        pooled: Tensor = self.norm2(self.proj(self.pool(self.norm1(tokens))))
        return pooled


class TextImageTime(nn.Module):
    """image_proj(image) + text_norm(text_proj(text)): (N, text_channels) and (N, image_channels) -> (N, channels)."""

    def __init__(self, text_channels: int, image_channels: int, channels: int) -> None:
        super().__init__()
        self.text_proj = nn.Linear(text_channels, channels)
        self.text_norm = nn.LayerNorm(channels)
        self.image_proj = nn.Linear(image_channels, channels)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        both: Tensor = self.image_proj(image) + self.text_norm(self.text_proj(text))
        return both


class ImageTime(nn.Module):
    """image_norm(image_proj(image)): (N, image_channels) -> (N, channels).

    With `hinted` it also has the convolutions of `hint`: (N, 3, 8 H, 8 W) -> (N, 4, H, W).
    """

    def __init__(self, image_channels: int, channels: int, *, hinted: bool) -> None:
        super().__init__()
        self.image_proj = nn.Linear(image_channels, channels)
        self.image_norm = nn.LayerNorm(channels)
        if hinted:
            layers: list[nn.Module] = []
            for before, after, stride in _HINT:
                layers += [nn.Conv2d(before, after, 3, padding=1, stride=stride), nn.SiLU()]
            self.input_hint_block = nn.Sequential(*layers[:-1])

    def forward(self, image: Tensor) -> Tensor:
        normed: Tensor = self.image_norm(self.image_proj(image))
        return normed

    def hint(self, picture: Tensor, context: Context) -> Tensor:
        for layer in self.input_hint_block:
            picture = apply(layer, picture, context.packs) if isinstance(layer, nn.Conv2d) else layer(picture)
        return picture


class ImageTokens(nn.Module):
    """norm(W image + b) as 32 tokens: (N, image_channels) -> (N, 32, channels)."""

    def __init__(self, image_channels: int, channels: int) -> None:
        super().__init__()
        self.image_embeds = nn.Linear(image_channels, _IMAGE_TOKENS["image_proj"] * channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, text: Tensor | None, image: Tensor) -> Tensor:
        projected = self.image_embeds(image.to(self.image_embeds.weight.dtype))
        tokens: Tensor = self.norm(projected.unflatten(-1, (_IMAGE_TOKENS["image_proj"], -1)))
        return tokens


class TextImageTokens(nn.Module):
    """A picture as 10 tokens, then those of the text: (N, S, text_channels) -> (N, 10 + S, channels)."""

    def __init__(self, text_channels: int, channels: int) -> None:
        super().__init__()
        self.image_embeds = nn.Linear(channels, _IMAGE_TOKENS["text_image_proj"] * channels)
        self.text_proj = nn.Linear(text_channels, channels)

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        tokens = self.image_embeds(image).unflatten(-1, (_IMAGE_TOKENS["text_image_proj"], -1))
        # Every attention reads both, once for a run.
        return torch.cat([tokens, self.text_proj(text)], dim=1)


def made_once(cache: Cache, layers: nn.Module, given: Sequence[Tensor], make: Callable[[], Tensor]) -> Tensor | None:
    """What `make` gives, which reads these tensors and the layers' parameters and nothing else: remembered for a run.

    None where it cannot be: a layer is somebody else's, or gradients are recorded."""
    inner = [layer for layer in layers.modules() if not list(layer.children())]
    made_of = [*given, *layers.parameters()]
    known = all(is_plain(layer) or is_plain_norm(layer) or type(layer) is nn.SiLU for layer in inner)
    return cache.get(None, made_of, make) if known and settled(*made_of) else None


def added_embedding(c: SimpleNamespace, channels: int) -> nn.Module | None:
    """The module that addition_embed_type asks for; what it gives has `channels`."""
    kind, text = c.addition_embed_type, c.cross_attention_dim[0]
    if kind == "text_time":
        return EmbeddingMLP(c.projection_class_embeddings_input_dim, channels)
    if kind == "text":
        return TextTime(c.encoder_hid_dim or text, channels, heads=c.addition_embed_type_num_heads)
    if kind == "text_image":
        return TextImageTime(text, text, channels)
    if kind in ("image", "image_hint"):
        return ImageTime(c.encoder_hid_dim, channels, hinted=kind == "image_hint")
    return None


def token_projection(c: SimpleNamespace) -> nn.Module | None:
    """The module that encoder_hid_dim_type asks for."""
    kind, channels = c.encoder_hid_dim_type, c.cross_attention_dim[0]
    if kind == "text_proj":
        return nn.Linear(c.encoder_hid_dim, channels)
    if kind == "text_image_proj":
        return TextImageTokens(c.encoder_hid_dim, channels)
    return ImageTokens(c.encoder_hid_dim, channels) if kind == "image_proj" else None
