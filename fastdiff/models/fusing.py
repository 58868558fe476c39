"""Modules of any network whose calls have one meaning, and what runs in the place of their forwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.models import known
from fastdiff.models.calls import Left, check
from fastdiff.models.fused import (
    FLOATS,
    Fused,
    convolve_doubled,
    doubling_obstacle,
    is_foldable,
    leave,
    norm_obstacle,
    normed,
    unfit,
)
from fastdiff.models.library import taken
from fastdiff.models.library_attention import FusedAttention, FusedTransformerBlock
from fastdiff.models.library_blocks import FusedResnet, FusedUpsample


@dataclass(frozen=True)
class _Plan:
    """The steps of a Sequential: one member, or two that are one operator. Valid for these members of these classes."""

    members: list[nn.Module]
    forwards: list[Any]
    steps: list[tuple[str, tuple[nn.Module, ...]]]

    def holds(self, members: list[nn.Module]) -> bool:
        return members == self.members and [type(member).forward for member in members] == self.forwards


class FusedSequential(Fused):
    """Members that follow each other as one operator each: silu(group_norm(x)), and the convolution of a doubled map.

    The members are looked at in every call: one that was exchanged, hooked or wrapped is called.
    """

    _plan = _Plan([], [], [])

    def fused(self, x: Any) -> Any:
        if not self._plan.holds(list(self.owner._modules.values())):  # type: ignore[arg-type]
            self._plan = plan(self.owner)
        for kind, members in self._plan.steps:
            reason = "" if kind == "call" else self._obstacle(kind, members, x)
            if reason is not None:
                for member in members:
                    x = member(x)
                self.parts.leave(reason or None)
            elif kind == "norm":
                x = normed(members[0], x)
            else:
                x = convolve_doubled(members[1], x, self.kept)
        return x

    def _obstacle(self, kind: str, members: tuple[nn.Module, ...], x: Any) -> str | None:
        """Why two members are called as they are; "" for what everybody expects, None where they are one operator."""
        own = self.parts.rewrites
        if not (own.group_norm_silu if kind == "norm" else own.upsample_conv):
            return ""
        if kind == "norm":
            if not all(map(known.is_bare, members)):
                return "a hook or another forward is on a GroupNorm or its SiLU"
            return norm_obstacle(members[0], x)
        if not (known.is_upsample(members[0]) and is_foldable(members[1])):
            return "a hook or another forward is on an Upsample or its convolution"
        return doubling_obstacle(members[1], x)


def plan(module: nn.Module) -> _Plan:
    members: list[Any] = list(module._modules.values())
    steps: list[tuple[str, tuple[nn.Module, ...]]] = []
    index = 0
    while index < len(members):
        kind = _pair(members[index : index + 2])
        count = 1 if kind is None else 2
        steps.append((kind or "call", tuple(members[index : index + count])))
        index += count
    return _Plan(members, [type(member).forward for member in members], steps)


def _pair(members: list[Any]) -> str | None:
    if len(members) < 2:
        return None
    if known.group_norm(members[0]) and known.is_silu(members[1]):
        return "norm"
    return "doubling" if known.is_upsample(members[0]) and is_foldable(members[1]) else None


def has_pairs(module: nn.Module) -> bool:
    """Whether some members of a Sequential can be one operator."""
    return known.is_plain_sequential(module) and any(kind != "call" for kind, _ in plan(module).steps)


class FusedGEGLU(Fused):
    """a * gelu(b) with [a, b] = proj(x) in one operator; the layer is called as it is."""

    def check_class(self) -> None:
        if not known.is_geglu(self.owner):
            raise Left(f"the forward of {type(self.owner).__name__} was replaced")

    def fused(self, x: Any = None, *more: Any, **options: Any) -> Any:
        check(self.parts.rewrites.geglu)
        taken(not more and not options)
        owner: Any = self.owner
        leave(unfit(x, tuple(owner.parameters()) if torch.is_grad_enabled() else ()))
        projected = owner.proj(x)
        if type(projected) is Tensor and projected.dtype in FLOATS and projected.shape[-1] % 2 == 0:
            return ops.geglu(projected)
        a, b = projected.chunk(2, dim=-1)
        return a * F.gelu(b)


REPLACEMENTS: tuple[tuple[Callable[[nn.Module], bool], type[Fused]], ...] = (
    (has_pairs, FusedSequential),
    (known.is_geglu, FusedGEGLU),
    *((kind.proves, kind) for kind in (FusedResnet, FusedUpsample, FusedAttention, FusedTransformerBlock)),
)
"""What proves that a module's forward may be replaced, and what replaces it."""


def replacement(module: nn.Module) -> type[Fused] | None:
    return next((kind for proves, kind in REPLACEMENTS if proves(module)), None)
