"""What the calls that stand for the library's own share: leaving one to the library, and its results' classes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from fastdiff.ops import networks


class Left(Exception):
    """This call is the library's own. `reason` says why; None where that need not be said."""

    def __init__(self, reason: str | None) -> None:
        super().__init__(reason)
        self.reason = reason


Call = Callable[..., Any]
"""call(network, module, *args, **kwargs): what a forward of the library's gives for these arguments.

Raises Left, before anything has been computed, for arguments that the network does not take."""


def note(name: str, reason: str | None, warned: set[str], *, depth: int) -> None:
    """Counts a call that was left to the library, and warns of each reason once, `depth` frames above this one."""
    if reason is None:
        return
    networks.leave(name, reason, calls=1)
    if reason not in warned:
        warned.add(reason)
        warnings.warn(f"fastdiff: {name} runs as before: {reason}", stacklevel=depth + 1)


def output(module: nn.Module, name: str, value: Tensor, return_dict: bool) -> Any:
    """The value as the library's class of that name, or in a tuple."""
    return getattr(sys.modules[type(module).__module__], name)(value) if return_dict else (value,)


def check(condition: bool) -> None:
    """Leaves a call to the library where the condition does not hold; the report says nothing of it."""
    if not condition:
        raise Left(None)


def takes(condition: bool, ours: str = "network") -> None:
    """The same for arguments, of which the report tells that the library has taken what ours would not."""
    if not condition:
        raise Left(f"it was called with arguments that fastdiff's {ours} does not take")


def refuse(**arguments: Any) -> None:
    """Leaves a call to the library if one of these arguments is not None."""
    for name, value in arguments.items():
        if value is not None:
            raise Left(f"it was called with {name}")


def plain_kwargs(name: str, given: Mapping[str, Any] | None) -> None:
    """Leaves a call to the library if its keywords for the attention processors change anything."""
    for key, value in (given or {}).items():
        if not (value is None or (key == "scale" and value == 1)):
            raise Left(f"it was called with {name}={{{key!r}: ...}}")
