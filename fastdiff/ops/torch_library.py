"""Backends that are a library's own kernels: PyTorch's attention and convolutions, where those are the fastest."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops.reference import interleave_phases, memory_format
from fastdiff.ops.registry import Backend


class _Attention:
    name = "torch"

    def unavailable(self) -> str | None:
        return None

    def supports(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> str | None:
        if mask is not None and q.device.type != "cpu":
            return "for a row with every key masked only PyTorch's CPU kernels are known to give 0"
        return None

    def cedes(self, *args: object) -> bool:
        return False

    def run(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        if mask is not None:
            # Without its broadcast dimensions, which PyTorch would write out.
            mask = mask[tuple(slice(1 if stride == 0 else None) for stride in mask.stride())]
            if mask.dtype not in (torch.bool, q.dtype):
                mask = mask.to(torch.promote_types(q.dtype, torch.float32))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return out.transpose(1, 2).contiguous().transpose(1, 2)


@cache
def onednn_dtypes() -> frozenset[torch.dtype]:
    """What oneDNN multiplies on this machine's CPU."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    found = {torch.float32}
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found.add(torch.bfloat16)
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():
        found.add(torch.float16)
    return frozenset(found)


def onednn_multiplies(x: Tensor) -> bool:
    return x.is_cpu and x.dtype in onednn_dtypes() and x.numel() > 0 and bool(torch.backends.mkldnn.enabled)


class _ConvBiasResidual:
    name = "torch"

    def unavailable(self) -> str | None:
        return None

    def supports(self, *args: object) -> str | None:
        return None

    def cedes(self, *args: object) -> bool:
        return False

    def run(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        residual: Tensor | None,
        stride: list[int],
        padding: list[int],
    ) -> Tensor:
        layout = memory_format(x)
        if residual is None:
            y = F.conv2d(x, weight, bias, stride, padding)
        elif onednn_multiplies(x) and layout == torch.channels_last:
            y = torch.ops.mkldnn._convolution_pointwise.binary(
                x, residual, weight, bias, padding, stride, [1, 1], 1, "add", None, None, [], None
            )
        else:
            y = F.conv2d(x, weight, bias, stride, padding).add_(residual)
        return y.contiguous(memory_format=layout)


class _UpsampleConv:
    name = "torch"

    def unavailable(self) -> str | None:
        return None

    def supports(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
        return None

    def cedes(self, *args: object) -> bool:
        return False

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        each = None if bias is None else bias.repeat(4)
        return interleave_phases(F.conv2d(x, weight, each, padding=1), x)


BACKENDS: dict[str, Backend] = {
    "attention": _Attention(),
    "conv_bias_residual": _ConvBiasResidual(),
    "upsample_conv": _UpsampleConv(),
}
