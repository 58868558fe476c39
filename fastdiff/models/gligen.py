"""Where in the picture something is to be, and what: GLIGEN's boxes as tokens."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

__all__ = ["ObjectEmbedding"]

_FREQUENCIES = 8
_BOX = 4 * 2 * _FREQUENCIES
"""Features of a box: sine and cosine of four sides at each frequency."""
_HIDDEN = 512


class ObjectEmbedding(nn.Module):
    """MLP([what is in the box, the box's sides in sines and cosines]), with learned features where there is nothing.

    boxes (N, B, 4) in [0, 1]; masks (N, B), 1 where there is a box; what is in them (N, B, object_channels) -> tokens
    (N, B, object_channels). With `pictured` there are phrases and pictures, each with a mask, and twice as many tokens.
    Source: Li et al., "GLIGEN: Open-Set Grounded Text-to-Image Generation", 2023, section 3.
    """

    def __init__(self, object_channels: int, *, pictured: bool) -> None:
        super().__init__()
        self.pictured = pictured
        if pictured:
            self.linears_text = _layers(object_channels)
            self.linears_image = _layers(object_channels)
            self.null_text_feature = nn.Parameter(torch.zeros(object_channels))
            self.null_image_feature = nn.Parameter(torch.zeros(object_channels))
        else:
            self.linears = _layers(object_channels)
            self.null_positive_feature = nn.Parameter(torch.zeros(object_channels))
        self.null_position_feature = nn.Parameter(torch.zeros(_BOX))

    def forward(
        self,
        boxes: Tensor,
        masks: Tensor,
        positive_embeddings: Tensor | None = None,
        phrases_masks: Tensor | None = None,
        image_masks: Tensor | None = None,
        phrases_embeddings: Tensor | None = None,
        image_embeddings: Tensor | None = None,
    ) -> Tensor:
        box = _or_null(_waves(boxes), masks, self.null_position_feature)
        if not self.pictured:
            inside = _or_null(positive_embeddings, masks, self.null_positive_feature)
            tokens: Tensor = self.linears(torch.cat([inside, box], dim=-1))
            return tokens
        phrases = _or_null(phrases_embeddings, phrases_masks, self.null_text_feature)
        pictures = _or_null(image_embeddings, image_masks, self.null_image_feature)
        both = [
            self.linears_text(torch.cat([phrases, box], dim=-1)),
            self.linears_image(torch.cat([pictures, box], dim=-1)),
        ]
        return torch.cat(both, dim=1)


def _layers(channels: int) -> nn.Sequential:
    sizes = (channels + _BOX, _HIDDEN, _HIDDEN, channels)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.SiLU()]
    return nn.Sequential(*layers[:-1])


def _or_null(features: Tensor | None, mask: Tensor | None, null: Tensor) -> Tensor:
    assert features is not None
    assert mask is not None
    mask = mask[..., None]
    return features * mask + (1 - mask) * null


def _waves(boxes: Tensor) -> Tensor:
    """(N, B, 4) -> (N, B, 64): for each frequency 100^(k/8) the sines of the four sides, then their cosines."""
    frequencies = 100 ** (torch.arange(_FREQUENCIES, device=boxes.device) / _FREQUENCIES)
    angles = frequencies.to(boxes.dtype)[:, None] * boxes[:, :, None]
    return torch.stack([angles.sin(), angles.cos()], dim=-2).flatten(2)
