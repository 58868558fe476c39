"""Inputs that the operators' tests and `opcheck` share."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, mean: float = 0.0) -> Tensor:
    """Standard normal values around `mean`, equal for a seed on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) + mean).to(dtype)
