"""The tensors that the cases are given, and their bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(*shape: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal values, equal for a seed on every machine."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


def size(*tensors: Tensor) -> int:
    """Their bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
