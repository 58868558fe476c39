"""What a module of the library is when its class has just made it, and what has become another since."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastdiff.models.forward import Forward, replacer
from fastdiff.models.leaf import is_own

__all__ = ["Facts", "difference", "facts", "full_name", "written_over"]

_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor", "XFormersAttnProcessor")
"""Ways of computing one and the same attention."""
_ADDED_PROCESSORS = tuple(name.replace("Attn", "AttnAddedKV") for name in _PROCESSORS)
"""The same where the text has projections of its own."""
_FREE = frozenset({"training", "gradient_checkpointing", "sliceable_head_dim", "enabled", "fused_projections"})
"""Attributes that change how a module of the library computes but not what."""
_AUTHORS = ("diffusers", "torch")
"""Where the forwards of the library's modules are written."""


@dataclass(frozen=True)
class Facts:
    """What a module of the library is when its class has just made it."""

    kind: type
    values: Mapping[str, Any]
    children: frozenset[str]
    shapes: Mapping[str, torch.Size | None]


def facts(module: nn.Module) -> dict[str, Facts]:
    """The facts of a module and of all inside it, by their paths."""
    return {
        path: Facts(
            type(inner),
            {name: value for name, value in vars(inner).items() if name[0] != "_" and _is_value(value)},
            frozenset(name for name, child in inner._modules.items() if child is not None),
            {name: None if p is None else p.shape for name, p in inner._parameters.items()},
        )
        for path, inner in module.named_modules(remove_duplicate=False)
    }


def _is_value(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | tuple)


def difference(module: nn.Module, path: str, known: Facts) -> str | None:
    """What is not as the configuration made it in the module itself."""
    held = vars(module)
    if held["_forward_hooks"] or held["_forward_pre_hooks"]:
        return f"{path} has a forward hook"
    for name, value in held.items():
        if name in known.values and name not in _FREE:
            if not _is_value(value) or value != known.values[name]:
                return f"{path}.{name} is {value!r}, not {known.values[name]!r}"
        elif (
            callable(getattr(type(module), name, None)) and not isinstance(value, Forward) and not is_own(module, name)
        ):
            return f"{path}.{name} was replaced by {replacer(module, value)}"
    processor = held.get("processor")
    names = _PROCESSORS if held.get("added_kv_proj_dim") is None else _ADDED_PROCESSORS
    if processor is not None and not _is_library_processor(processor, names):
        return f"{path} has the attention processor {full_name(type(processor))}"
    shapes = {name: None if p is None else p.shape for name, p in held["_parameters"].items()}
    if shapes != known.shapes:
        return f"{path} has the parameters {shapes}, not {dict(known.shapes)}"
    return None


def written_over(kind: Any) -> str | None:
    """Who has put another forward into a class, of which every module of that kind has it."""
    author = getattr(kind.forward, "__globals__", {}).get("__name__", "torch")
    return None if author.partition(".")[0] in _AUTHORS else f"{kind.__name__}.forward was replaced by {author}"


def _is_library_processor(processor: Any, names: tuple[str, ...]) -> bool:
    kind = type(processor)
    return kind.__name__ in names and kind.__module__.startswith("diffusers.")


def full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
