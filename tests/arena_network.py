"""A network of ours for tests of the arena."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastdiff import ops


class Network(nn.Module):
    """Convolutions, norms, an upsampling and attention, with temporaries of many sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(4, 32, 3, padding=1), nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.project, self.last = nn.Linear(32, 96), nn.Conv2d(32, 4, 3, padding=1)
        self.register_buffer("folded", ops.fold_upsample(torch.randn(32, 32, 3, 3) / 17))

    def forward(self, x: Tensor) -> Tensor:
        h = ops.group_norm_silu(self.first(x), 8)
        inside = ops.group_norm_silu(self.second(h), 8)
        n, c, height, width = inside.shape
        q, k, v = self.project(inside.flatten(2).transpose(1, 2)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        attended = ops.attention(q, k, v).transpose(1, 2).flatten(2).transpose(1, 2).reshape(n, c, height, width)
        return self.last(h + ops.upsample_conv(inside + attended, self.folded))


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network().requires_grad_(False)
