"""The group norm that the time scales and shifts."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastdiff.models.context import Context, Time
from fastdiff.models.maps import Map, normed

__all__ = ["AdaNorm"]


class AdaNorm(nn.Module):
    """group_norm(x) (1 + a) + b with [a, b] = W time + bias, of which each channel has its own; x (N, C, H, W), or
    with `second` the first of those channels, of which second has the rest.

    Source: Dhariwal and Nichol 2021, section 3.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    silu = False

    def __init__(self, time_channels: int, channels: int, *, groups: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.linear = nn.Linear(time_channels, 2 * channels)

    def forward(self, x: Map, context: Context, second: Tensor | None = None) -> Tensor:
        time = self.project(context.time, context) if context.projected is None else context.projected[self]
        assert time is not None
        a, b = time[:, :, None, None].chunk(2, dim=1)
        return torch.addcmul(b, normed(self, x, context, second=second), 1 + a)

    def project(self, time: Time | None, context: Context) -> Tensor | None:
        """[a, b], (N, 2 C)."""
        return None if time is None else self.linear(self.time_input(time))

    def time_input(self, time: Time) -> Tensor:
        """What the layer of `project` reads."""
        return time.embedding

    def time_addend(self, context: Context) -> Tensor | None:
        """What `project` adds to what that layer gives."""
        return None

    def time_layer(self) -> nn.Module:
        """The layer of `project`."""
        return self.linear
