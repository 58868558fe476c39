"""The times of a sampling run, found from the time of one step, and tables of what depends on them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.models.caches import Cache

__all__ = ["RunCache", "locate"]


def locate(t: Tensor) -> tuple[Tensor, int] | None:
    """(times, i) where t is a view of element i, and of no other, of a vector `times` of several; else None.

    A loop over a scheduler's timesteps gives such views, expanded to the batch or not. No data is looked at.
    """
    if torch.compiler.is_compiling() or t.is_inference():
        return None
    times = t._base
    if times is None or times.dim() != 1 or len(times) < 2 or t.numel() == 0 or t.dtype != times.dtype:
        return None
    if any(stride and size > 1 for size, stride in zip(t.shape, t.stride(), strict=True)):
        return None
    # What a graph replays must read the time anew.
    if not times.stride(0) or (t.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None
    return times, (t.storage_offset() - times.storage_offset()) // times.stride(0)


class RunCache(Cache):
    """Tables over the times of a run, each tied to the tensors that it was made of."""

    def table(self, key: Hashable, tensors: Sequence[Tensor], make: Callable[[], Any]) -> Any | None:
        """What `make` gives, from the second call with these tensors on; None at the first.

        Tensors that come once, such as labels joined anew for every step, are not worth a table of all steps.
        """
        if torch.compiler.is_compiling() or any(tensor.is_inference() for tensor in tensors):
            return None
        held = self.get(key, tensors, dict)
        if not held:
            held["seen"] = True
            return None
        if "table" not in held:
            held["table"] = make()
        return held["table"]
