"""The public operators of networks that join a norm or an activation with what stands around it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdiff.ops import network_checks as checks
from fastdiff.ops.calling import call


def geglu(x: Tensor) -> Tensor:
    """a * gelu(b) with x = [a, b] and gelu(b) = b * Phi(b), Phi(b) = (1 + erf(b / sqrt(2))) / 2.

    x: (..., 2H) float32, float16 or bfloat16; a is the first half of the last dimension, b the second. The result
    (..., H) is contiguous and has x's dtype. float32 arithmetic; the error function itself, not the tanh formula.
    Errors: InputError for a last dimension that is odd or missing.
    Source: Shazeer, "GLU Variants Improve Transformer", 2020, equation 5; Hendrycks & Gimpel, "Gaussian Error Linear
    Units", 2016.
    """
    checks.geglu(x)
    return call("geglu", (x.contiguous(),))


def layer_norm_modulate(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    return_sum: bool = False,
) -> Any:
    """y = ((h - mean) / sqrt(var + eps) * weight + bias) * (1 + scale) + shift with h = x + gate * residual.

    y, or (y, h). Mean and biased variance are taken over the C channels of each position, of the unrounded h. What is
    not given leaves its term out; without a gate h = x + residual.

    x: (N, ..., C) float32, float16 or bfloat16; y and h are contiguous and have its shape and dtype. residual: x's
    shape and dtype. weight, bias: (C,). scale, shift, gate: (N, C), one row per sample, also as a slice of one tensor
    with all of them. Each of the five has x's dtype or float32. float32 arithmetic and statistics, with no cancellation
    for large means.
    Errors: InputError for arguments that do not fit, and for a gate without a residual.
    Source: Ba et al., "Layer Normalization", 2016; Peebles & Xie, "Scalable Diffusion Models with Transformers", 2023,
    section 3.2 (scale, shift and gate).
    """
    checks.layer_norm_modulate(x, weight, bias, scale, shift, residual, gate)
    arguments = (
        x.contiguous(),
        weight if weight is None else weight.contiguous(),
        bias if bias is None else bias.contiguous(),
        _rows(scale),
        _rows(shift),
        float(eps),
        residual if residual is None else residual.contiguous(),
        _rows(gate),
        return_sum,
    )
    y, h = call("layer_norm_modulate", arguments)
    return (y, h) if return_sum else y


def _rows(values: Tensor | None) -> Tensor | None:
    """(N, C) whose rows are each dense, wherever they lie."""
    return values if values is None or values.stride(-1) == 1 else values.contiguous()
