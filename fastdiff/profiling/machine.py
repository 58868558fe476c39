"""What this machine can do at best, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import nn

from fastdiff.models.prepacked import Packs, products, takes
from fastdiff.models.rewrites import Rewrites

__all__ = ["Machine"]

_SIZES, _LONGEST = (512, 1024, 2048), 0.5
_LARGEST = 2**28


class Machine:
    """The rates of the threads that PyTorch uses now.

    flops(dtype)    operations in a second of the fastest product of square matrices, of PyTorch or of ours
    copying(bytes)  bytes in a second of a copy that reads and writes as many together, so from cache where they fit
    """

    def __init__(self) -> None:
        self.threads = torch.get_num_threads()

    def flops(self, dtype: torch.dtype) -> float:
        rates: list[float] = []
        for n in _SIZES:
            # Where a dtype has no fast products, large ones take too long.
            if rates and 2 * n**3 / rates[-1] > _LONGEST:
                break
            rates.append(_product(dtype, n, self.threads))
        return max(rates)

    def copying(self, size: int) -> float:
        """Measured at the next power of two, at most 256 MiB."""
        return _copy(min(max(2 ** (max(size, 1) - 1).bit_length(), 2**14), _LARGEST), self.threads)

    def seconds(self, flops: int, moved: int, dtype: torch.dtype) -> float:
        """The shortest time for so many operations and bytes: the roofline's."""
        computing = flops / self.flops(dtype) if flops else 0.0
        return max(computing, moved / self.copying(moved) if moved else 0.0)


@lru_cache(maxsize=64)
def _product(dtype: torch.dtype, n: int, threads: int) -> float:
    leaf, x = nn.Linear(n, n, bias=False, dtype=dtype).requires_grad_(False), torch.ones(1, n, n, dtype=dtype)
    weight, packs = leaf.weight.t(), Packs().ready(x, Rewrites())
    calls: list[Callable[[], object]] = [lambda: x[0] @ weight]
    if packs is not None and takes((leaf,), x, packs):
        calls.append(lambda: products((leaf,), x, packs))
    return 2 * n**3 / min(map(_shortest, calls))


@lru_cache(maxsize=64)
def _copy(size: int, threads: int) -> float:
    source, target = (torch.ones(size // 2, dtype=torch.uint8) for _ in range(2))
    return size / _shortest(lambda: target.copy_(source))


def _shortest(call: Callable[[], object], seconds: float = 0.05) -> float:
    """The shortest time of a call among those of so many seconds, after one that does not count; at least three."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
