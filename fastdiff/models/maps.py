"""What all blocks do with a feature map besides convolving it."""

from __future__ import annotations

from torch import Tensor

from fastdiff.models.context import Context


def scaled(x: Tensor, scale: float, context: Context) -> Tensor:
    """x / scale, which for a scale of 1 is x."""
    return x if scale == 1.0 and context.rewrites.unit_scale else x / scale
