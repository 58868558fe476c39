"""A device that is not waited for, on the CPU: what would read a value of one of its tensors is refused.

A GPU computes behind the host, which has to wait wherever a number on the device decides what the host does next.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_COPIES = frozenset(("tolist", "numpy", "__array__", "cpu"))
_READERS = frozenset(
    (
        *("item", "__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__", "__format__"),
        *("__repr__", "nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "equal", "allclose"),
        *("is_nonzero", "bincount"),
    )
)
_READING_KERNELS = frozenset(
    (
        *("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"),
        *("aten::masked_select", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount"),
    )
)
_watching: ContextVar[bool] = ContextVar("watching", default=False)


class Waited(AssertionError):
    """A value was read that only the device has."""


class OnDevice(Tensor):
    """A tensor that stands for one on the device, as does what is made of it or taken out of it."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if _watching.get():
            _refuse(func, args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs or {})


def on_device(value: Tensor) -> Tensor:
    return value.as_subclass(OnDevice)


@contextmanager
def the_device_is_not_read() -> Iterator[None]:
    """Waited where a value of an `OnDevice` is read. What an operator does inside is its own affair."""
    token = _watching.set(True)
    try:
        yield
    finally:
        _watching.reset(token)


@contextmanager
def nothing_is_read() -> Iterator[None]:
    """Waited where a value of any tensor is read, wherever it is; but for a copy of one on the host, from which tables
    are made."""
    with the_device_is_not_read(), _Functions(), _Kernels():
        yield


class _Functions(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        _refuse(func, args, kwargs or {}, copies=False)
        return func(*args, **(kwargs or {}))


class _Kernels(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func._schema.name in _READING_KERNELS:
            raise Waited(f"{func._schema.name} reads a tensor")
        return func(*args, **(kwargs or {}))


def _refuse(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, copies: bool = True) -> None:
    name = getattr(func, "__name__", "")
    to_host = name == "to" and "cpu" in [value for value in (*args[1:], *kwargs.values()) if isinstance(value, str)]
    counts = name == "where" and len(args) == 1
    by_index = name == "__getitem__" and _reads_index(*args)
    if name in _READERS or counts or by_index or (copies and (to_host or name in _COPIES)):
        raise Waited(f"{name} reads a tensor")


def _reads_index(value: Tensor, index: Any) -> bool:
    """A mask, whose number of elements has to be known, or an index on the device into what is not there."""
    if not isinstance(index, Tensor):
        return False
    return index.dtype == torch.bool or (isinstance(index, OnDevice) and not isinstance(value, OnDevice))
