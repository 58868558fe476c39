"""The layers with weights, which other code may put layers of its own in the place of."""

from __future__ import annotations

from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

_PLAIN = (nn.Linear, nn.Conv2d)
_WEIGHTS = (nn.Parameter, FakeTensor)
_METHODS = ("forward", "_conv_forward")


def is_plain(leaf: nn.Module) -> bool:
    """Whether calling this layer is its product with `weight` plus `bias` and nothing else: no adapter around it, no
    hook on it, no method replaced, no weight that is quantized or computed, no padding but zeros."""
    held = leaf.__dict__
    return (
        type(leaf) in _PLAIN
        and not (held["_forward_hooks"] or held["_forward_pre_hooks"])
        and all(method not in held or is_own(leaf, method) for method in _METHODS)
        and type(held["_parameters"].get("weight")) in _WEIGHTS
        and held.get("padding_mode", "zeros") == "zeros"
    )


def is_own(module: nn.Module, method: str) -> bool:
    """Whether what the module itself holds by that name is its class's method, put back by a hook that has gone."""
    held = module.__dict__[method]
    own = getattr(type(module), method, None)
    return getattr(held, "__self__", None) is module and getattr(held, "__func__", None) is own
