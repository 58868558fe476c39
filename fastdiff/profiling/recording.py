"""The packed products of `fastdiff.models.prepacked`, as PyTorch's profiler sees them: a layer each, with its shapes.

They call the compiled extension or oneDNN, of which a profiler shows nothing, or no shapes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import Tensor
from torch._C._profiler import _RecordFunctionFast

from fastdiff.models import prepacked

__all__ = ["EVENTS", "packed_products_recorded"]


def _convolve(conv: Any, x: Tensor, *_: Any, **more: Any) -> tuple[Any, ...]:
    return (*_convolution(conv, x), more.get("addend"))


def _convolve_doubled(conv: Any, x: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
    return _convolution(conv, x)


def _convolve_both(conv: Any, x: Tensor, second: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
    return (*_convolution(conv, x), second)


def _products(leaves: Any, x: Tensor, *_: Any, **__: Any) -> tuple[Any, ...]:
    """Those of aten::linear, with more than one weight."""
    return (x, *(leaf.weight for leaf in leaves))


def _convolution(conv: Any, x: Tensor) -> tuple[Any, ...]:
    """Those of aten::conv2d. Tuples of numbers are lists, since the profiler keeps no others."""
    sizes = (list(size) if isinstance(size, tuple) else size for size in (conv.stride, conv.padding, conv.dilation))
    return (x, conv.weight, conv.bias, *sizes, conv.groups)


EVENTS: dict[str, Callable[..., tuple[Any, ...]]] = {
    "convolve": _convolve,
    "convolve_doubled": _convolve_doubled,
    "convolve_both": _convolve_both,
    "products": _products,
}
"""By the function's name, the inputs of its event, made of its arguments."""


@contextmanager
def packed_products_recorded() -> Iterator[None]:
    """Inside, each call of them is an event `fastdiff::<function>`.

    The functions are replaced where networks have imported them, so that outside a call pays for none of this.
    """
    of_networks = [module for name, module in list(sys.modules.items()) if name.startswith("fastdiff.models.")]
    functions = [(getattr(prepacked, name), _recorded(name, getattr(prepacked, name))) for name in EVENTS]
    replaced = [
        (module, attribute, own, recorded)
        for own, recorded in functions
        for module in of_networks
        for attribute, value in vars(module).items()
        if value is own
    ]
    try:
        for module, attribute, _, recorded in replaced:
            setattr(module, attribute, recorded)
        yield
    finally:
        for module, attribute, own, _ in replaced:
            setattr(module, attribute, own)


def _recorded(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    inputs = EVENTS[name]

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Tensor:
        with _RecordFunctionFast(f"fastdiff::{name}", inputs(*args, **kwargs), {}):
            return function(*args, **kwargs)

    return call
