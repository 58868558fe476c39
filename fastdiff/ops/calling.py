"""How a public function calls its operator, and how it is asked which backend would run that call."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch

from fastdiff import config
from fastdiff.ops import dispatch
from fastdiff.ops.registry import OPERATORS

_is_compiling = torch.compiler.is_compiling
_explaining: ContextVar[bool] = ContextVar("fastdiff_explaining", default=False)


class _Explained(Exception):
    """Carries the explanation out of an operator that is only being asked about."""


def call(name: str, args: tuple[Any, ...]) -> Any:
    """The registered operator; inside use_backend('reference') the plain PyTorch function, which has gradients."""
    if not _is_compiling():
        if _explaining.get():
            raise _Explained(dispatch.explain(name, args))
        if config.forced_backend(name) == "reference":
            return OPERATORS[name].reference(*args)
    return dispatch.call(name, args)


def plain_step(*args: Any) -> Any:
    """`dispatch.plain_step`, but for a call that is only being asked about."""
    return None if _explaining.get() else dispatch.plain_step(*args)


def plain_norm(*args: Any) -> Any:
    """`dispatch.plain_norm`, but for a call that is only being asked about."""
    return None if _is_compiling() or _explaining.get() else dispatch.plain_norm(*args)


def explanation(public: Callable[[], Any]) -> str:
    """What `dispatch.explain` says of the call that `public` makes; nothing is computed."""
    token = _explaining.set(True)
    try:
        public()
    except _Explained as explained:
        return str(explained)
    finally:
        _explaining.reset(token)
    raise AssertionError("unreachable: every operator goes through `call`")
