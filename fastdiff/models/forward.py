"""A `forward` of ours on somebody else's module: an attribute of that one object, and the way back."""

from __future__ import annotations

import inspect
import types
import weakref
from typing import Any

import torch
from torch import nn

_SLOTS = ("forward", "_old_forward")
"""Where a module's own forward is looked up; the second is where hooks that replace the first keep it."""


class Forward:
    """Called in the place of `type(owner).forward`. It goes with copies of its owner, pickled ones too.

    The owner is held by a weak reference: a network that nobody else holds is freed at once.
    """

    def __init__(self, owner: nn.Module) -> None:
        self._owner = weakref.ref(owner)
        self.__signature__ = inspect.signature(self.original)

    def install(self) -> None:
        owner = self.owner
        setattr(owner, "_old_forward" if "_old_forward" in vars(owner) else "forward", self)

    @property
    def owner(self) -> nn.Module:
        owner = self._owner()
        if owner is None:
            raise ReferenceError("fastdiff: the network that this is the forward of is there no more")
        return owner

    @property
    def original(self) -> Any:
        """The owner's own forward."""
        owner = self.owner
        return types.MethodType(type(owner).forward, owner)

    @property
    def __code__(self) -> types.CodeType:
        """The original's, which `torch.export` looks for."""
        return inspect.unwrap(self.original).__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # What is compiled or traced is the module's own code, in which no state of ours is looked up.
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            owner = self.owner
            return type(owner).forward(owner, *args, **kwargs)
        return self.run(*args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def undo(self) -> None:
        """What else is to be done when the forward is taken away."""

    def copied(self, owner: nn.Module, memo: dict[int, Any]) -> Any:
        """The forward of a copy of its owner."""
        return type(self)(owner, *self.arguments())

    def arguments(self) -> tuple[Any, ...]:
        """Those it was made with, besides its owner."""
        return ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self.copied(memo.get(id(self.owner), self.owner), memo)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.owner, *self.arguments()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def forward(module: nn.Module) -> Forward | None:
    """Our forward of a module, if it has one."""
    return next((value for slot in _SLOTS if isinstance(value := vars(module).get(slot), Forward)), None)


def foreign(module: nn.Module) -> str | None:
    """What has taken the place of a module's own forward, if it is not ours nor a hook of the library around it."""
    held = vars(module)
    inside = held.get("_old_forward", held.get("forward"))
    if inside is None or isinstance(inside, Forward) or getattr(inside, "__func__", None) is type(module).forward:
        return None
    return f"its forward was replaced by {replacer(module, inside)}"


def replacer(module: nn.Module, value: Any) -> str:
    """Who has put `value` in the place of a method: the hooks of accelerate or diffusers, or what it calls itself."""
    held = vars(module)
    hooks = [held.get("_hf_hook"), *getattr(held.get("_diffusers_hook"), "hooks", {}).values()]
    names = [f"{type(hook).__module__}.{type(hook).__qualname__}" for hook in hooks if hook is not None]
    return ", ".join(names) or getattr(value, "__qualname__", type(value).__qualname__)


def remove(module: nn.Module) -> None:
    """Gives a module and those inside it their own forwards back."""
    for inner in module.modules():
        for slot in _SLOTS:
            value = vars(inner).get(slot)
            if isinstance(value, Forward):
                if value.owner is inner:  # a shallow copy has the forward of what it is a copy of
                    value.undo()
                if slot == "forward":
                    delattr(inner, slot)
                else:
                    setattr(inner, slot, value.original)
