"""Calls in which tensors stand for something else than numbers: what PyTorch records, differentiates or maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

__all__ = ["is_transformed", "tensors"]

_PLAIN = (Tensor, nn.Parameter, FakeTensor)
_MODES = torch._C._TorchDispatchModeKey


def is_transformed(given: Iterable[Tensor], parameter: Tensor | None) -> bool:
    """Whether a network with that parameter has to run operator by operator as its author wrote it.

    So it is under the transforms of `torch.func`, forward-mode derivatives and `make_fx`, for tensors of other classes,
    and for tensors without data in a network that has some.
    """
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    if torch._C._get_dispatch_mode(_MODES.PROXY) is not None:
        return True
    kinds = {type(each) for each in given}
    fake = FakeTensor in kinds or torch._C._get_dispatch_mode(_MODES.FAKE) is not None
    return not kinds.issubset(_PLAIN) or fake != isinstance(parameter, FakeTensor)


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
