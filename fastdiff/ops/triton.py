"""The Triton backends: on a GPU, or on the CPU in Triton's interpreter (TRITON_INTERPRET=1) when demanded.

The only module that imports `fastdiff.kernels`, and only once a kernel is to run.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastdiff import config
from fastdiff.ops.checks import MAX_HEAD_DIM
from fastdiff.ops.registry import Backend, KernelBackend, noise_dtype, sample_size


@cache
def _missing() -> str | None:
    if find_spec("triton") is None:
        return "the package triton is not installed"
    return None


class _Triton(KernelBackend):
    """`fastdiff.kernels.<operator>.run`, which takes the arguments of the schema."""

    name = "triton"

    def unavailable(self) -> str | None:
        if _missing() is not None:
            return _missing()
        if not torch.cuda.is_available() and not config.triton_interpreted():
            return "there is no GPU, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
        return None

    def _absent(self, first: Tensor) -> str | None:
        device = first.device.type
        if _missing() is not None:
            return _missing()
        if device != "cuda" and not (device == "cpu" and config.triton_interpreted()):
            return f"the tensors are on {device}, and Triton's interpreter is off (TRITON_INTERPRET=1 turns it on)"
        return None

    def run(self, *args: Any) -> Any:
        return import_module(f"fastdiff.kernels.{self.operator}").run(*args)


def _attention_limits(q: Tensor, *_: Any) -> str | None:
    return f"head dimension {q.shape[-1]} is over {MAX_HEAD_DIM}" if q.shape[-1] > MAX_HEAD_DIM else None


# Head dimensions that the attention kernels of PyTorch (cuDNN, FlashAttention) are tuned for; at others they pad, and
# with few keys memory is the limit. After published figures: not yet measured on a GPU.
_PYTORCH_HEAD_DIMS = (64, 80, 96, 128)
_FEW_KEYS = 128


def _attention_cedes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> bool:
    if mask is not None:
        return False
    return q.dtype == torch.float32 or (q.shape[-1] in _PYTORCH_HEAD_DIMS and k.shape[2] > _FEW_KEYS)


MAX_NORMED_CHANNELS = 16384
"""Channels of a row that layer_norm_modulate's kernel holds in registers."""


def _layer_norm_limits(x: Tensor, *_: Any) -> str | None:
    if x.shape[-1] > MAX_NORMED_CHANNELS:
        return f"its kernel takes rows of up to {MAX_NORMED_CHANNELS} channels, not {x.shape[-1]}"
    return None


# Products in a sum up to which adding in the same pass saves more than cuDNN's faster products do. Estimated from a
# GPU's bandwidth and its tensor cores' rate: not yet measured on one.
_SHALLOW = 3072


def _conv_bias_residual_cedes(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, *_: Any) -> bool:
    return x.dtype == torch.float32 or residual is None or weight[0].numel() > _SHALLOW


def _upsample_conv_cedes(x: Tensor, *_: Any) -> bool:
    """float32 products run on no tensor core of ours; cuDNN has kernels for them."""
    return x.dtype == torch.float32


BACKENDS: dict[str, Backend] = {
    "sampler_step": _Triton("sampler_step", 2),
    "add_noise": _Triton("add_noise", 1),
    "philox_normal": _Triton("philox_normal", 0),
    "group_norm_silu": _Triton("group_norm_silu", 1),
    "attention": _Triton("attention", 3, _attention_limits, _attention_cedes),
    "guidance_weights": _Triton("guidance_weights", 1),
    "dynamic_threshold": _Triton("dynamic_threshold", 2, sample_size(2**30)),
    "langevin_step_size": _Triton("langevin_step_size", 2, noise_dtype),
    "geglu": _Triton("geglu", 1),
    "layer_norm_modulate": _Triton("layer_norm_modulate", 1, _layer_norm_limits),
    "conv_bias_residual": _Triton("conv_bias_residual", 2, cedes=_conv_bias_residual_cedes),
    "upsample_conv": _Triton("upsample_conv", 2, cedes=_upsample_conv_cedes),
}
