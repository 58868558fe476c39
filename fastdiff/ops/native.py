"""The compiled backends: C++ on the CPU, CUDA C++ on an NVIDIA GPU where it is written.

`csrc/register_*.cpp` hold the other side. Arguments were checked by the public functions; here stands only what each
kernel can take.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastdiff.ops.reference import memory_format
from fastdiff.ops.registry import Backend, KernelBackend, noise_dtype, sample_size
from fastdiff.ops.torch_library import onednn_multiplies

ON_CUDA = ("sampler_step", "add_noise", "philox_normal", "group_norm_silu")
"""Operators with a CUDA C++ kernel; the others run on Triton there."""

MAX_CUDA_GROUP = 12288
"""Channels of a channels-last group: beyond, a row does not fit the shared memory of a block."""


@cache
def extension() -> ModuleType | str:
    """The compiled module fastdiff._C, or why it cannot be had."""
    try:
        return import_module("fastdiff._C")
    except ImportError as error:
        return f"the compiled extension cannot be loaded ({error}); reinstall fastdiff with a C++ compiler present"


def cuda_built() -> bool:
    """Whether the extension was compiled with its CUDA kernels."""
    module = extension()
    return not isinstance(module, str) and bool(module.cuda_built())


def capability() -> str:
    """The instruction set that the CPU kernels use here: DEFAULT, AVX2 or AVX512."""
    module = extension()
    return "none" if isinstance(module, str) else str(module.cpu_capability())


@cache
def plain_step() -> Callable[..., Any] | None:
    """The compiled step that checks its own arguments, or None."""
    module = extension()
    return None if isinstance(module, str) else module.plain_step


@cache
def bare_step() -> Callable[..., Any] | None:
    """The same for a row of nothing but x and the model output, or None."""
    module = extension()
    return None if isinstance(module, str) else module.bare_step


@cache
def plain_norm() -> Callable[..., Any] | None:
    """The compiled norm that checks its own arguments, or None."""
    module = extension()
    return None if isinstance(module, str) else module.plain_norm


def take_plain_steps() -> int:
    """How many calls `plain_step` and `bare_step` have taken since this was last asked."""
    module = extension()
    return 0 if isinstance(module, str) else int(module.take_plain_steps())


def take_plain_norms() -> int:
    """How many calls `plain_norm` has taken since this was last asked."""
    module = extension()
    return 0 if isinstance(module, str) else int(module.take_plain_norms())


@dataclass(frozen=True)
class Arenas:
    """bytes: what all arenas hold now. hits, misses: allocations that were handed a block of theirs, and those for
    which one was taken from the system, since the process started (or the last `report(reset=True)`)."""

    bytes: int = 0
    hits: int = 0
    misses: int = 0


def arenas(*, reset: bool = False) -> Arenas:
    """What `fastdiff.models.arena.Arena` objects have done."""
    module = extension()
    return Arenas() if isinstance(module, str) else Arenas(*module.arena_totals(reset))


@cache
def written() -> tuple[Callable[[Tensor], None], Callable[[], int]]:
    """(watch, count): from now on writes to a watched tensor through its `data` are counted, for all tensors together.

    The tensor's own version does not count them. Without the extension nobody does: the count stays 0.
    """
    module = extension()
    if isinstance(module, str):
        return lambda tensor: None, lambda: 0
    module.notice_writes()
    return module.watch_writes, module.unseen_writes


class _Native(KernelBackend):
    """A function of fastdiff._C."""

    name = "native"
    _run: Callable[..., Any] | None = None

    def unavailable(self) -> str | None:
        module = extension()
        return module if isinstance(module, str) else None

    def _absent(self, first: Tensor) -> str | None:
        if self._run is None:
            module = extension()
            if isinstance(module, str):
                return module
            self._run = getattr(module, self.operator)
        if first.is_cpu:
            return None
        if not first.is_cuda:
            return f"it runs on cpu and cuda, not on {first.device.type}"
        if self.operator not in ON_CUDA:
            return "no CUDA C++ kernel is written for it; Triton runs it"
        if not cuda_built():
            return "the extension was built without CUDA; set FASTDIFF_CUDA=1 and reinstall"
        return None

    def run(self, *args: Any) -> Any:
        assert self._run is not None  # `supports` came first
        return self._run(*args)


def _group_norm_silu_limits(x: Tensor, groups: int, *args: Any) -> str | None:
    second = args[-2]
    if not x.is_cuda or memory_format(x, second) == torch.contiguous_format:
        return None
    size = (x.shape[1] + (0 if second is None else second.shape[1])) // groups
    if size > MAX_CUDA_GROUP:
        return f"its CUDA kernel takes channels-last groups of up to {MAX_CUDA_GROUP} channels, not {size}"
    return None


def _conv_bias_residual_cedes(x: Tensor, *_: Any) -> bool:
    """oneDNN is as fast in float32, where networks pack a weight once and here it is packed anew, and has instructions
    for narrower products, which are float32's here."""
    return onednn_multiplies(x)


BACKENDS: dict[str, Backend] = {
    "sampler_step": _Native("sampler_step", 2),
    "add_noise": _Native("add_noise", 1),
    "philox_normal": _Native("philox_normal", 0),
    "group_norm_silu": _Native("group_norm_silu", 1, _group_norm_silu_limits),
    "attention": _Native("attention", 3),
    "guidance_weights": _Native("guidance_weights", 1),
    "dynamic_threshold": _Native("dynamic_threshold", 2, sample_size(2**32 - 1)),
    "langevin_step_size": _Native("langevin_step_size", 2, noise_dtype),
    "geglu": _Native("geglu", 1),
    "layer_norm_modulate": _Native("layer_norm_modulate", 1),
    "conv_bias_residual": _Native("conv_bias_residual", 2, cedes=_conv_bias_residual_cedes),
    "upsample_conv": _Native("upsample_conv", 2),
}
