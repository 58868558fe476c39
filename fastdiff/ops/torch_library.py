"""Backends that are a library's own kernel: PyTorch's fused attention, for the shapes where it is the fastest."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.registry import Backend


class _Attention:
    name = "torch"

    def unavailable(self) -> str | None:
        return None

    def supports(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> str | None:
        if mask is not None:
            return "PyTorch's attention gives NaN, not 0, for a row with every key masked"
        return None

    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2)


BACKENDS: dict[str, Backend] = {"attention": _Attention()}
