"""What the packed products do, as PyTorch's profiler sees it: a layer each, with its shapes.

The functions of `prepacked` call the compiled extension or oneDNN, of which a profiler shows either nothing or no
shapes. Inside `torch.profiler.profile` each of their calls is an event `fastdiff::<function>` whose first inputs are
those of `aten::conv2d` or `aten::linear`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch._C._profiler import _RecordFunctionFast
from torch.autograd import profiler

__all__ = ["recorded"]

P = ParamSpec("P")
Result = TypeVar("Result")


def recorded(inputs: Callable[P, tuple[Any, ...]]) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """A function that is an event while a profiler runs. inputs: the event's, made of the function's arguments; empty
    where PyTorch's own operators show the call."""

    def decorate(function: Callable[P, Result]) -> Callable[P, Result]:
        name = f"fastdiff::{function.__name__}"

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> Result:
            if not profiler._is_profiler_enabled:
                return function(*args, **kwargs)
            described = inputs(*args, **kwargs)
            if not described:
                return function(*args, **kwargs)
            with _RecordFunctionFast(name, described, {}):
                return function(*args, **kwargs)

        return call

    return decorate
