"""`accelerate` and `restore`: other people's networks on fastdiff's own, and back."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import nn

from fastdiff.errors import InputError
from fastdiff.integrations.patch import patch_scheduler, unpatch_scheduler
from fastdiff.models.conversion import Conversion, Part, Whole, entry
from fastdiff.models.convert import converter
from fastdiff.models.forward import Forward, foreign, remove
from fastdiff.models.fused import Parts
from fastdiff.models.fusing import replacement
from fastdiff.models.kept import Own
from fastdiff.models.loading import Model
from fastdiff.models.rewrites import Rewrites
from fastdiff.ops import networks

__all__ = ["accelerate", "restore"]

Target = TypeVar("Target")

_COMPILED = "torch.compile runs the library's code"
_patched: weakref.WeakSet[Any] = weakref.WeakSet()
"""The schedulers that `accelerate` has put into pipelines."""


_ours: weakref.WeakKeyDictionary[nn.Module, Own] = weakref.WeakKeyDictionary()
"""The networks of ours that `accelerate` was given."""


@dataclass
class _Plan:
    """What is to be done: new conversions, old ones and networks of ours that get other rewrites, single forwards; and
    what is left, why."""

    new: list[Conversion] = field(default_factory=list)
    old: list[Conversion] = field(default_factory=list)
    forwards: list[Forward] = field(default_factory=list)
    ours: list[Any] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def count(self) -> int:
        return len(self.new) + len(self.old) + len(self.forwards) + len(self.ours)


def accelerate(target: Target, *, rewrites: Rewrites | Iterable[str] | None = None, strict: bool = False) -> Target:
    """The same object, whose networks compute the same function in fewer and larger steps; in place.

    target     a pipeline of diffusers (each of its networks, and its scheduler as `patch_scheduler` does); a
               UNet2DModel, UNet2DConditionModel, AutoencoderKL, ControlNetModel or DiTTransformer2DModel of diffusers;
               a network of fastdiff's; or any module, in which such networks are found, and modules whose forward is
               known: in an nn.Sequential a GroupNorm and a SiLU or a doubling and a convolution, GEGLU layers, and
               diffusers' ResnetBlock2D, Attention, Upsample2D and BasicTransformerBlock
    rewrites   names out of `fastdiff.models.rewrites.Rewrites`, all for None
    strict     raise an error, and change nothing, if something would be left as it is

    Parameters, state dict, configuration and signature stay the network's own: moving it, loading into it, LoRA through
    PEFT, copies and pickles go on as before and take effect in the next call. A change that leaves no trace in PyTorch,
    such as writing to `weight.numpy()` or from another process, is taken up after another `accelerate`.
    Calls that fastdiff's network or block does not take (some arguments, attention processors, hooks inside, autocast,
    gradients) run on the library's code; all but gradients and training are warned of once and listed in
    `fastdiff.report()`. What `torch.compile` or `torch.jit.trace` sees is the library's code too. Several threads may
    call one network.

    Errors: InputError for a target that has no network, for an unknown rewrite, and as `strict` says.
    """
    chosen = Rewrites.parse(rewrites)
    if isinstance(target, Model) or _is_ours(target):
        _take(target.network if isinstance(target, Model) else target, chosen)
        return target
    plan = _Plan()
    for name, network in _networks("accelerate", target):
        _add(plan, name, network, chosen)
    if strict and plan.left:
        raise InputError(f"accelerate: strict=True, and {_sentence(plan.left)}")
    if chosen.sampler_step:
        _patch(target, strict=strict)
    for conversion in plan.new:
        conversion.install()
    for conversion in plan.old:
        conversion.refresh(chosen)
    for each in plan.forwards:
        each.install()
    for network in plan.ours:
        _take(network, chosen)
    for name, reason in plan.left:
        for conversion in (*plan.new, *plan.old):
            if conversion.name == name:
                conversion.told(reason)
        networks.leave(name, reason, calls=0)
        warnings.warn(f"fastdiff: {name} runs as before: {reason}", stacklevel=2)
    return target


def restore(target: Target) -> Target:
    """The same object with its own forwards and, in a pipeline, diffusers' own scheduler: `accelerate` undone.

    What is not accelerated is left alone. Errors: InputError for a target that has no network.
    """
    if isinstance(target, Model):
        restore(target.network)
        return target
    for _, network in _networks("restore", target):
        remove(network)
        for ours in filter(_is_ours, network.modules()):
            ours.rewrites = Rewrites()  # type: ignore[assignment]
            if ours in _ours:
                networks.forget(_ours.pop(ours))
    if any(scheduler in _patched for scheduler in _schedulers(target)):
        unpatch_scheduler(target)
    return target


def _take(network: Any, rewrites: Rewrites) -> None:
    """Gives a network of ours its rewrites, and the report its name."""
    network.rewrites = rewrites
    if network not in _ours:
        _ours[network] = Own(type(network).__name__, network)
        networks.watch(_ours[network])


def _is_ours(target: Any) -> bool:
    return isinstance(target, nn.Module) and isinstance(getattr(target, "rewrites", None), Rewrites)


def _networks(caller: str, target: Any) -> list[tuple[str, nn.Module]]:
    """(name, module) of what is to be looked at: the module itself, or those of a pipeline but its text encoders."""
    if isinstance(target, nn.Module):
        return [("", target)]
    parts = getattr(target, "components", None)
    if not isinstance(parts, Mapping):
        raise InputError(
            f"{caller}: target is a {type(target).__name__}: expected a pipeline of diffusers or a torch.nn.Module"
        )
    found = [(name, part) for name, part in parts.items() if isinstance(part, nn.Module) and not _is_encoder(part)]
    if not found:
        raise InputError(f"{caller}: target is a {type(target).__name__} without a network; load its components first")
    return found


def _is_compiled(module: nn.Module) -> bool:
    # Known by its name: importing its class would import all of the compiler.
    return type(module).__module__ == "torch._dynamo.eval_frame" and hasattr(module, "_orig_mod")


def _is_model(module: nn.Module) -> bool:
    return type(module).__module__.startswith("diffusers.") and hasattr(module, "config")


def _is_encoder(module: nn.Module) -> bool:
    # Wrappers such as PEFT's have mixins of that library, which are no modules.
    kinds = (kind for kind in type(module).__mro__ if issubclass(kind, nn.Module))
    return any(kind.__module__.startswith("transformers.") for kind in kinds)


def _add(plan: _Plan, name: str, network: nn.Module, rewrites: Rewrites) -> None:
    before, found = plan.count() + len(plan.left), len(plan.new) + len(plan.old) + len(plan.left)
    _walk(plan, name, network, rewrites, title=_title(name, network), parts={})
    reason = f"fastdiff has no network for {type(network).__name__}"
    if plan.count() + len(plan.left) == before:
        plan.left.append((_title(name, network), reason))
    elif len(plan.new) + len(plan.old) + len(plan.left) == found and _is_model(network):
        # Of a model of the library's single parts are not the whole that the caller has asked for.
        plan.left.append((_title(name, network), f"{reason}; blocks inside it are accelerated"))


def _walk(
    plan: _Plan, name: str, module: nn.Module, rewrites: Rewrites, *, title: str, parts: dict[type, Parts]
) -> None:
    if _is_compiled(module):
        inner: Any = module._orig_mod
        plan.left.append((_title(name, inner), f"{_COMPILED}; pass the uncompiled module"))
        return
    if _is_ours(module):
        plan.ours.append(module)
        return
    if converter(module) is not None or entry(module) is not None:
        _convert(plan, name, module, rewrites)
        return
    kind = replacement(module)
    if kind is not None and foreign(module) is None:
        of_class = type(module)
        if of_class not in parts:
            parts[of_class] = Parts(f"{title}: {of_class.__name__}", rewrites)
        plan.forwards.append(kind(module, parts[of_class]))
    for key, child in module.named_children():
        _walk(plan, f"{name}.{key}" if name else key, child, rewrites, title=title, parts=parts)


def _convert(plan: _Plan, name: str, module: nn.Module, rewrites: Rewrites) -> None:
    kind: Any = converter(module)
    # A part may be met without the whole that it was converted with.
    config: Any = getattr(module, "config", None)
    parts: dict[nn.Module, Part | None] = {
        module.get_submodule(path): Part(type(module), dict(config), path) for path in (kind.parts if kind else ())
    } or {module: None}
    present = [found.conversion for part in parts if (found := entry(part)) is not None]
    whole = present[0].whole if present else Whole(_title(name, module))
    for inner, part in parts.items():
        found = entry(inner)
        _choose(plan, Conversion(inner, whole, rewrites, part) if found is None else found.conversion, found is None)


def _choose(plan: _Plan, conversion: Conversion, new: bool) -> None:
    module: Any = conversion.module()
    reason = foreign(module)
    if reason is None:
        try:
            reason = conversion.obstacle() or (_COMPILED if module._compiled_call_impl else None)
        except InputError as error:
            reason = str(error)
        else:
            # What stands in the way now may go away.
            (plan.new if new else plan.old).append(conversion)
    if reason is not None and (conversion.name, reason) not in plan.left:
        plan.left.append((conversion.name, reason))


def _title(name: str, module: nn.Module) -> str:
    return f"{name} ({type(module).__name__})" if name else type(module).__name__


def _sentence(left: list[tuple[str, str]]) -> str:
    return "; ".join(f"{name} would run as before: {reason}" for name, reason in left)


def _schedulers(target: Any) -> list[Any]:
    if isinstance(target, nn.Module):
        return []
    return [part for part in target.components.values() if hasattr(part, "set_timesteps")]


def _patch(target: Any, *, strict: bool) -> None:
    if _schedulers(target):
        patch_scheduler(target, strict=strict)
        _patched.update(_schedulers(target))
