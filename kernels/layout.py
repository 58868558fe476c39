"""How a tensor lies in memory: what the launchers need to know of it."""

from __future__ import annotations

import torch
from torch import Tensor

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def memory_format(x: Tensor, second: Tensor | None = None) -> torch.memory_format:
    """Channels-last if x is that and not contiguous, else contiguous: the layout in which its kernel runs.

    With a second input beside it: that of `second` where x lies in either layout.
    """
    if second is not None and x.is_contiguous():
        layout = memory_format(second)
        return layout if x.is_contiguous(memory_format=layout) else torch.contiguous_format
    last = _CHANNELS_LAST.get(x.dim())
    if last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format


def dense(x: Tensor) -> Tensor:
    """x itself where it is contiguous or channels-last, else a contiguous copy."""
    return x.contiguous(memory_format=memory_format(x))


def contiguous(x: Tensor | None) -> Tensor | None:
    """An optional tensor in its logical order."""
    return None if x is None else x.contiguous()


def inner(x: Tensor) -> int:
    """C for a dense channels-last tensor, whose element (c, s) lies at s * C + c; 1 for a contiguous one."""
    return 1 if x.is_contiguous() else x.shape[1]
