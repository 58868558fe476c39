"""A network of ours over the layers of another: the other's own modules and parameters, looked after at every call."""

from __future__ import annotations

import operator
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from fastdiff.errors import InputError
from fastdiff.models.attention import PackedAttention
from fastdiff.models.caches import Cache
from fastdiff.models.facts import Facts, difference, full_name, written_over
from fastdiff.models.kept import caches, copies

_LEAVES = (nn.Linear, nn.Conv2d)
"""Other code may put layers of its own in their place; ours call whatever lies there."""
_SHARED = (*_LEAVES, nn.LayerNorm, nn.Embedding)
"""The other network's objects take the place of ours. Other modules of ours only read the other's parameters."""
_FUSED = frozenset({"to_qkv", "to_kv"})
"""Layers of an attention that only a processor for fused projections reads; they stay when it has gone."""
_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)

_parents: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_changes = 0


def _count_change(parent: nn.Module, name: str, child: Any) -> None:
    # A layer that was wrapped, had its weight written to, and was unwrapped between two calls is the same object with
    # the same version as before.
    global _changes
    # A compiler, which may run this, would guard what it compiles on the members of the set.
    if not torch.compiler.is_compiling() and parent in _parents:
        _changes += 1


_watching = threading.Lock()
_watched = False


def _watch_changes() -> None:
    global _watched
    with _watching:
        if not _watched:
            torch_module.register_module_module_registration_hook(_count_change)
            _watched = True


@dataclass
class _State:
    """What was seen of the other network when it was last examined, in a form that is quick to compare."""

    changes: int
    reason: str | None = None
    holders: list[dict[str, Any]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    hooks: list[dict[int, Any]] = field(default_factory=list)
    hooked: list[bool] = field(default_factory=list)
    children: list[dict[str, Any]] = field(default_factory=list)
    families: list[tuple[Any, ...]] = field(default_factory=list)
    attentions: list[dict[str, Any]] = field(default_factory=list)
    processors: list[Any] = field(default_factory=list)
    dropouts: list[nn.Module] = field(default_factory=list)
    replaced: list[nn.Module] = field(default_factory=list)
    kinds: dict[type, Any] = field(default_factory=dict)

    def fix(self) -> None:
        self.sizes = list(map(len, self.holders))
        self.hooked = list(map(bool, self.hooks))
        self.families = [tuple(children.values()) for children in self.children]
        self.processors = [held.get("processor") for held in self.attentions]

    def holds(self) -> bool:
        return (
            self.changes == _changes
            and list(map(len, self.holders)) == self.sizes
            and list(map(bool, self.hooks)) == self.hooked
            and all(map(_same, map(tuple, map(dict.values, self.children)), self.families))
            and all(map(operator.is_, [held.get("processor") for held in self.attentions], self.processors))
            and all(map(operator.is_, map(_forward, self.kinds), self.kinds.values()))
        )


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one == other


_forward = operator.attrgetter("forward")


class Shared:
    """`network`, made on the meta device, with the layers of `original`, of which `known` are the facts.

    Raises InputError if the two have not the same parameters.
    """

    def __init__(self, original: nn.Module, network: nn.Module, known: Mapping[str, Facts]) -> None:
        self.network = network.eval().requires_grad_(False)
        self._known = known
        self._lock = threading.Lock()
        self._state = _State(changes=-1)
        self._inner = list(network.modules())
        self._places = list(_places(network))
        self._lenders = [
            (path, module)
            for path, module in network.named_modules()
            if type(module) not in _SHARED and (module._parameters or module._buffers)
        ]
        ours = {name: p.shape for name, p in network.named_parameters()}
        theirs = {
            f"{path}.{name}" if path else name: shape
            for path, fact in known.items()
            for name, shape in fact.shapes.items()
            if shape is not None
        }
        if different := sorted(ours.items() ^ theirs.items()):
            raise InputError(f"its parameters are not those of fastdiff's network: {different[0][0]}")
        _watch_changes()
        self.sync(original)

    def sync(self, original: nn.Module) -> str | None:
        """Takes over what was exchanged in `original`; why the network cannot stand for it now, or None."""
        if not self._state.holds():
            with self._lock:
                if not self._state.holds():
                    self._link(original)
        return self._state.reason or (_watched_all() if any(_HOOKS) else None)

    def requires_grad(self) -> bool:
        state = self._state
        layers = chain.from_iterable(held["_parameters"].values() for held in state.holders)
        others = chain.from_iterable(layer.parameters() for layer in state.replaced)
        return any(p is not None and p.requires_grad for p in chain(layers, others))

    def parameter(self) -> Tensor | None:
        """Some parameter."""
        found = (held["_parameters"].get("weight") for held in self._state.holders)
        return next((weight for weight in found if isinstance(weight, Tensor)), None)

    def drops(self) -> bool:
        """Whether some dropout would make a call random."""
        return any(layer.training and layer.p for layer in self._state.dropouts)

    def caches(self) -> Iterator[Cache]:
        return caches(self._inner)

    def copies(self) -> int:
        """Bytes of the tensors that the network's caches hold and that are not the parameters themselves."""
        found = (held["_parameters"].get("weight") for held in self._state.holders)
        return copies(self._inner, (weight for weight in found if weight is not None))

    def _attentions(self) -> Iterator[PackedAttention]:
        return (module for module in self._inner if isinstance(module, PackedAttention))

    def unpack(self) -> None:
        """Gives the parameters that lie side by side memory of their own again."""
        for attention in self._attentions():
            attention.unpack()

    def _link(self, original: nn.Module) -> None:
        state = _State(changes=_changes)
        state.reason = self._examine(original, "", state)
        _parents.update(module for module in original.modules() if module._modules)
        if state.reason is None:
            for path, name, children in self._places:
                children[name] = original.get_submodule(path)._modules[name]
            for path, module in self._lenders:
                lender = original.get_submodule(path)
                # The very dictionaries, so that a parameter put into one is in the other.
                vars(module).update(_parameters=lender._parameters, _buffers=lender._buffers)
            if self.network.rewrites.qkv:  # type: ignore[union-attr]
                for attention in self._attentions():
                    attention.pack()
        for cache in self.caches():
            cache.clear()
        state.fix()
        self._state = state

    def _examine(self, module: nn.Module, path: str, state: _State) -> str | None:
        """Notes a module and what is in it; says what is not as the configuration made it."""
        known = self._known[path]
        if type(module) is not known.kind:
            state.replaced.append(module)
            return (
                None if known.kind in _LEAVES else f"{path} is a {full_name(type(module))}, not a {known.kind.__name__}"
            )
        held = vars(module)
        state.kinds.setdefault(known.kind, known.kind.forward)
        if known.children or path == "":
            state.children.append(held["_modules"])
        if path:
            state.holders.append(held)
            state.hooks += [held["_forward_hooks"], held["_forward_pre_hooks"]]
        if isinstance(module, nn.Dropout):
            state.dropouts.append(module)
        attends = "processor" in held
        if attends:
            state.attentions.append(held)
        reasons = [written_over(known.kind), difference(module, path, known) if path else None]
        for name, child in held["_modules"].items():
            if child is not None and not (attends and name in _FUSED):
                inside = f"{path}.{name}" if path else name
                if name not in known.children:
                    reasons.append(f"{inside} ({full_name(type(child))}) is not of its configuration")
                else:
                    reasons.append(self._examine(child, inside, state))
        if missing := known.children - {name for name, child in held["_modules"].items() if child is not None}:
            reasons.append(f"{path}.{min(missing)} is missing")
        return next(filter(None, reasons), None)


def _watched_all() -> str | None:
    """Whether somebody has hooked all modules there are. PyTorch's own counters do so for the names' sake."""
    hooks = chain.from_iterable(each.values() for each in _HOOKS)
    others = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("torch.")]
    return "all modules have a forward hook" if others else None


def _places(network: nn.Module) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(path of the parent, name, the parent's children) of each layer that an object of the original replaces."""
    for path, parent in network.named_modules():
        for name, child in parent._modules.items():
            if type(child) in _SHARED:
                yield path, name, parent._modules
