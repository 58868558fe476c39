"""The normals of torch.randn, which adapters for other libraries draw, as fast as the processor can make them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from fastdiff.ops import native

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LEAST = 16  # PyTorch makes fewer one by one, in another way.

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack


def torch_normal(
    shape: Sequence[int],
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """torch.randn(shape, generator=generator, device=device, dtype=dtype), bit for bit, in a fraction of its time.

    The generator is left as torch.randn leaves it. PyTorch's Mersenne twister gives one word at a time; here it runs in
    vectors, and the Box-Muller transform on all threads. That is for float32, float16 and bfloat16 on a processor with
    AVX2; everything else, and a PyTorch that is found to draw otherwise, is torch.randn itself.
    Source: Matsumoto & Nishimura, "Mersenne Twister", 1998.
    """
    here = device == "cpu" or torch.device(device).type == "cpu"
    here = here and (generator is None or generator.device.type == "cpu")
    if not here or dtype not in _DTYPES or math.prod(shape) < _LEAST or _is_compiling() or _dispatch_modes():
        return torch.randn(tuple(shape), generator=generator, device=device, dtype=dtype)
    draw = _native(dtype)
    if draw is None:
        return torch.randn(tuple(shape), generator=generator, dtype=dtype)
    return draw(generator, shape, dtype)


@cache
def _native(dtype: torch.dtype) -> Callable[..., Tensor] | None:
    """The compiled function, if it gives this PyTorch's own normals."""
    module = native.extension()
    if isinstance(module, str) or module.cpu_capability() == "DEFAULT":
        return None
    draw: Callable[..., Tensor] = module.torch_normal
    for count in (_LEAST, 1000, 10_000):
        ours, theirs = (torch.Generator().manual_seed(count) for _ in range(2))
        agree = torch.equal(draw(ours, (count,), dtype), torch.randn(count, generator=theirs, dtype=dtype))
        if not agree or not torch.equal(ours.get_state(), theirs.get_state()):
            return None
    return draw
