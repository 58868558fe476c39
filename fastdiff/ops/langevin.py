"""A Langevin step whose size is that of the whole batch, as diffusers takes it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastdiff import config
from fastdiff.ops import native

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack


def langevin_correct(x: Tensor, score: Tensor, noise: Tensor, *, snr: float) -> Tensor | None:
    """x + e s + sqrt(2 e) z with e = 2 (snr mean |z| / mean |s|)^2, the mean over the batch of a sample's norm.

    x, score s, noise z: (N, ...) of one shape, float32, float16 or bfloat16, in any memory format. The result is
    float32 and contiguous; the sums are float32 within 1024 elements and float64 beyond, and their bits do not depend
    on the number of threads. In compiled code on the CPU; None for every other call: another device or dtype, tensors
    that record gradients or are seen by a dispatch mode, and inside `use_backend`. `langevin_step_size` is the
    operator for all of them, with a size for each sample.
    Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021, appendix G.
    """
    module = native.extension()
    if isinstance(module, str) or config.detours or _is_compiling() or _dispatch_modes():
        return None
    shape, recording = x.shape, torch.is_grad_enabled()
    for value in (x, score, noise):
        plain = type(value) is Tensor and value.is_cpu and value.dtype in _DTYPES and value.shape == shape
        if not plain or (recording and value.requires_grad):
            return None
    if not shape or x.numel() == 0:
        return None
    result: Tensor = module.langevin_correct(x, score, noise, snr)
    return result
