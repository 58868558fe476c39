"""The specification of the operators in `network`: plain PyTorch, as in `reference`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.reference import wide


def geglu(x: Tensor) -> Tensor:
    a, b = wide(x).chunk(2, dim=-1)
    return (a * F.gelu(b)).to(x.dtype)


def layer_norm_modulate(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gate: Tensor | None,
    return_sum: bool,
) -> tuple[Tensor, Tensor]:
    h = wide(x)
    if residual is not None:
        h = h + (wide(residual) if gate is None else _per_sample(gate, h) * wide(residual))
    own_weight, own_bias = (None if value is None else value.to(h.dtype) for value in (weight, bias))
    y = F.layer_norm(h, h.shape[-1:], own_weight, own_bias, eps)
    if scale is not None:
        y = y * (1.0 + _per_sample(scale, h))
    if shift is not None:
        y = y + _per_sample(shift, h)
    y = y.to(x.dtype)
    return y, h.to(x.dtype, copy=True) if return_sum else x.new_empty(0)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(N, C) as (N, 1, ..., C) in the dtype of `like`."""
    return values.to(like.dtype).reshape(len(values), *(1,) * (like.dim() - 2), -1)
