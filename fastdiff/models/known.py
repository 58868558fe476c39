"""What a module of somebody else's provably computes: by the forward that its class has, and by what was done to it.

A class is known if its forward is PyTorch's own, inherited or not; if its code is, instruction for instruction, that of
one of the functions below, which say what a formula looks like in a class of somebody's own; or if it is a class of
diffusers with the forward of its file.
"""

from __future__ import annotations

import builtins
import dis
import sys
import types
import weakref
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from fastdiff.models.leaf import is_own

_NEAREST = ("nearest", "nearest-exact")


def is_bare(module: nn.Module) -> bool:
    """Whether calling the module runs its class's forward and nothing else: no hook, no forward of its own."""
    held, kind = vars(module), type(module)
    return (
        not (held["_forward_hooks"] or held["_forward_pre_hooks"])
        and ("forward" not in held or is_own(module, "forward"))
        and held.get("_compiled_call_impl") is None
        and kind.__call__ is nn.Module.__call__
        and getattr(kind, "__getattr__", None) is nn.Module.__getattr__
        and kind.__getattribute__ is object.__getattribute__
        and not torch_module._has_any_global_hook()
    )


def group_norm(module: Any) -> str | None:
    """What calling the module is: "own" for torch.nn.GroupNorm, "float32" for that of x.float() given in x's dtype.

    None for all other modules.
    """
    if not (isinstance(module, nn.GroupNorm) and is_bare(module)):
        return None
    kind = type(module)
    if kind.forward is nn.GroupNorm.forward:
        return "own"
    return "float32" if _formula(kind, nn.GroupNorm) == "norm in float32" else None


def is_silu(module: Any) -> bool:
    """Whether calling the module is x * sigmoid(x)."""
    if not isinstance(module, nn.Module):
        return False
    kind = type(module)
    own = isinstance(module, nn.SiLU) and kind.forward is nn.SiLU.forward
    return (own or _formula(kind, nn.Module) == "silu") and is_bare(module)


def is_geglu(module: nn.Module) -> bool:
    """Whether the module's forward is a * gelu(b) with [a, b] = proj(x)."""
    kind = type(module)
    return _formula(kind, nn.Module) == "geglu" or is_library(kind, "diffusers.models.activations", "GEGLU")


def is_plain_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether the module's forward calls its members one after the other."""
    kind = type(module)
    return (
        isinstance(module, nn.Sequential)
        and kind.forward is nn.Sequential.forward
        and getattr(kind, "__iter__", None) is nn.Sequential.__iter__
    )


def is_upsample(module: Any) -> bool:
    """torch.nn.Upsample by nearest neighbours to twice the size in both directions."""
    return (
        isinstance(module, nn.Upsample)
        and type(module).forward is nn.Upsample.forward
        and is_bare(module)
        and module.mode in _NEAREST
        and module.size is None
        and module.scale_factor in (2.0, (2.0, 2.0))
        and not module.recompute_scale_factor
    )


def is_library(kind: type, home: str, name: str, method: str = "forward") -> bool:
    """Whether a class is the one of diffusers' module `home`, with the method that stands in its file."""
    if kind.__name__ != name or kind.__module__ != home:
        return False
    function = getattr(kind, method, None)
    file = getattr(sys.modules.get(home), "__file__", None)
    return (
        type(function) is types.FunctionType
        and function.__code__.co_filename == file
        and function.__code__.co_qualname == f"{name}.{method}"
    )


class _Norm(nn.GroupNorm):
    def by_type(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type(x.dtype)

    def by_to(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class _SiLU(nn.Module):
    def by_function(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    def by_method(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()

    def turned(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x) * x

    def functional(self, x: Tensor) -> Tensor:
        return F.silu(x)

    def functional_sigmoid(self, x: Tensor) -> Tensor:
        return x * F.sigmoid(x)

    def of_nn(self, x: Tensor) -> Tensor:
        return nn.functional.silu(x)

    def of_torch(self, x: Tensor) -> Tensor:
        return torch.nn.functional.silu(x)


class _GEGLU(nn.Module):
    proj: nn.Linear

    def value_first(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)

    def gate_first(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return F.gelu(gate) * x


_FORMULAS = {"norm in float32": _Norm, "silu": _SiLU, "geglu": _GEGLU}
_CALLED = 0xFF
"""The flags of a function's code that say how it is called; others tell of __future__ imports."""
_read: weakref.WeakKeyDictionary[Any, str | None] = weakref.WeakKeyDictionary()


def _formula(kind: type, base: type) -> str | None:
    """The formula that the forward of a class says, if the class itself defines it and derives from `base` only."""
    function = vars(kind).get("forward")
    if type(function) is not types.FunctionType or kind.__bases__ != (base,):
        return None
    # What super() means depends on the class that the function was written in.
    if any(cell.cell_contents is not kind for cell in function.__closure__ or ()):
        return None
    if function not in _read:
        _read[function] = next(
            (
                name
                for name, spellings in _FORMULAS.items()
                for each in vars(spellings).values()
                if isinstance(each, types.FunctionType) and _same(function, each)
            ),
            None,
        )
    return _read[function]


def _same(one: types.FunctionType, other: types.FunctionType) -> bool:
    """Whether two functions do the same: equal instructions on the same global objects."""
    codes = (one.__code__, other.__code__)
    shapes = [(c.co_argcount, c.co_kwonlyargcount, c.co_flags & _CALLED, c.co_freevars) for c in codes]
    plain = not (one.__defaults__ or one.__kwdefaults__)
    return plain and shapes[0] == shapes[1] and _instructions(one) == _instructions(other)


def _instructions(function: types.FunctionType) -> list[tuple[Any, ...]]:
    """Without the names of local variables; a global name as the object that it stands for."""
    found: list[tuple[Any, ...]] = []
    for each in dis.get_instructions(function):
        if each.opname == "LOAD_GLOBAL":
            missing = getattr(builtins, each.argval, None)
            found.append((each.opname, id(function.__globals__.get(each.argval, missing))))
        elif "FAST" in each.opname or "DEREF" in each.opname:
            found.append((each.opname, each.arg))
        else:
            found.append((each.opname, each.arg if isinstance(each.argval, int) else repr(each.argval)))
    return found
