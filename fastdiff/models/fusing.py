"""Modules of any network whose calls have one meaning: a Sequential with GroupNorm and SiLU in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models.forward import Forward

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class FusedSequential(Forward):
    """silu(group_norm(x)) in one operator wherever the two follow each other; every other member is called as it is.

    The members are looked at in every call: one that was exchanged, hooked or wrapped is called.
    """

    def run(self, x: Any) -> Any:
        members = list(self.owner._modules.values())
        index = 0
        while index < len(members):
            member = members[index]
            if is_pair(members[index : index + 2]) and _takes(member, x):
                x = ops.group_norm_silu(x, member.num_groups, member.weight, member.bias, eps=member.eps)  # type: ignore
                index += 2
            else:
                x = member(x)  # type: ignore[misc]
                index += 1
        return x


def is_fusible(module: nn.Module) -> bool:
    """Whether some members of a Sequential can be one operator."""
    members = list(module._modules.values())
    return type(module) is nn.Sequential and any(is_pair(members[i : i + 2]) for i in range(len(members)))


def is_pair(members: list[Any]) -> bool:
    return [type(member) for member in members] == [nn.GroupNorm, nn.SiLU] and all(map(_is_bare, members))


def _is_bare(module: nn.Module) -> bool:
    held = vars(module)
    return not (held["_forward_hooks"] or held["_forward_pre_hooks"] or "forward" in held)


def _takes(norm: Any, x: Any) -> bool:
    weight = norm.weight
    return (
        type(x) is Tensor
        and weight is not None
        and x.dim() > 2
        and x.dtype in _FLOATS
        and x.dtype == weight.dtype
        and x.device == weight.device
        and x.shape[1] == norm.num_channels
        and not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        and not torch.is_autocast_enabled(x.device.type)
    )


REPLACEMENTS: tuple[tuple[Callable[[nn.Module], bool], type[Forward]], ...] = ((is_fusible, FusedSequential),)
"""What proves that a module's forward may be replaced, and what replaces it."""


def replacement(module: nn.Module) -> type[Forward] | None:
    return next((kind for proves, kind in REPLACEMENTS if proves(module)), None)
