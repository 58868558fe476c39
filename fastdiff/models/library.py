"""Classes of diffusers whose forward is replaced: which they are, and what a call of one has to be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models import known
from fastdiff.models.calls import Left, takes
from fastdiff.models.fused import Fused, leave, unfit

_MODELS = "diffusers.models."
HOMES = {
    "ResnetBlock2D": _MODELS + "resnet",
    "Upsample2D": _MODELS + "upsampling",
    "Attention": _MODELS + "attention_processor",
    "BasicTransformerBlock": _MODELS + "attention",
}
"""Where each class is defined."""


def is_block(name: str, module: nn.Module) -> bool:
    return known.is_library(type(module), HOMES[name], name)


def taken(condition: bool) -> None:
    takes(condition, "block")


class Block(Fused):
    """A class of diffusers, while it has its own forward."""

    name: str

    @classmethod
    def proves(cls, module: nn.Module) -> bool:
        """Whether a module's forward may be replaced by this one."""
        return is_block(cls.name, module)

    def check_class(self) -> None:
        if not is_block(self.name, self.owner):
            raise Left(f"the forward of {self.name} was replaced")

    def check_unfit(self, x: Any, *others: Any) -> None:
        recorded = torch.is_grad_enabled()
        inputs = [other for other in others if isinstance(other, Tensor)]
        leave(unfit(x, (*inputs, *self.owner.parameters()) if recorded else ()))


def scaled(x: Tensor, factor: float) -> Tensor:
    """x / factor."""
    return x if factor == 1.0 else x / factor
