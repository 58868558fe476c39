"""A module of the library's whose calls run on a network of ours: its `forward`, and the way back."""

from __future__ import annotations

import copy
import inspect
import threading
import types
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn

from fastdiff.errors import InputError
from fastdiff.models import arena
from fastdiff.models.calls import Call, Left, check, note, takes
from fastdiff.models.convert import CONVERTERS, Converter, converter
from fastdiff.models.facts import Facts, facts
from fastdiff.models.forward import Forward, forward
from fastdiff.models.rewrites import Rewrites
from fastdiff.models.sharing import Shared
from fastdiff.models.tracing import is_transformed, tensors
from fastdiff.ops import networks


@dataclass(frozen=True)
class Part:
    """What a part's conversion has to know of the whole, which may be gone: class, configuration, and the path."""

    kind: type[nn.Module]
    config: Mapping[str, Any]
    path: str


class Whole:
    """A network of the library's as the report names it: one conversion, or one of each part."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.warned: set[str] = set()
        self._conversions: weakref.WeakSet[Conversion] = weakref.WeakSet()

    def add(self, conversion: Conversion) -> None:
        self._conversions.add(conversion)
        networks.watch(self)

    def remove(self, conversion: Conversion) -> None:
        self._conversions.discard(conversion)
        if not self._conversions:
            networks.forget(self)

    def copies(self) -> int:
        return sum(conversion.copies() for conversion in list(self._conversions))

    def __deepcopy__(self, memo: dict[int, Any]) -> Whole:
        memo[id(self)] = made = Whole(self.name)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Whole, (self.name,)


class Conversion:
    """One module of the library's and the network that stands for it. part: None where it has a configuration.

    What was computed from its parameters is forgotten when a layer is exchanged or a parameter gets other data. Writing
    through `weight.data[...]` leaves no trace: `refresh` says that it happened.
    """

    def __init__(self, module: nn.Module, whole: Whole, rewrites: Rewrites, part: Part | None = None) -> None:
        self._module, self.whole, self._rewrites, self._part = weakref.ref(module), whole, rewrites, part
        self._ended = False
        self._reset()

    def _reset(self) -> None:
        self._shared: Shared | None = None
        self._config: Any = None
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self.whole.name

    def install(self) -> None:
        """Puts our call into the module. Raises InputError if the configuration is not supported."""
        module = self.module()
        assert module is not None
        self._ready(module)
        Entry(module, self).install()
        self.whole.add(self)

    @property
    def rewrites(self) -> Rewrites:
        return self._rewrites

    def refresh(self, rewrites: Rewrites) -> None:
        """Takes up other rewrites, and forgets what was computed from the parameters."""
        self._rewrites = rewrites
        if self._shared is not None:
            self._shared.network.rewrites = rewrites  # type: ignore[assignment]
            for cache in self._shared.caches():
                cache.clear()
            arena.release(self._shared.network)

    def end(self) -> None:
        """The forward is the library's again, and the module as it was found."""
        self._ended = True
        if self._shared is not None:
            self._shared.unpack()
            arena.release(self._shared.network)
        self.whole.remove(self)

    def module(self) -> nn.Module | None:
        return self._module()

    def copies(self) -> int:
        return 0 if self._shared is None else self._shared.copies()

    def obstacle(self) -> str | None:
        """Why the network cannot stand for the module as both are now."""
        module = self.module()
        assert module is not None
        return self._ready(module).sync(module) or self._kind(module).obstacle(module)

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the forward gives. Raises Left where the library's own has to."""
        module = self.module()
        if module is None or self._ended:
            raise Left(None)
        try:
            reason = self.obstacle()
        except InputError as error:
            reason = str(error)  # its configuration is another now
        if reason is not None:
            raise Left(reason)
        shared = self._ready(module)
        given = list(tensors((args, kwargs)))
        check(not is_transformed(given, shared.parameter()))
        if torch.is_grad_enabled() and (any(each.requires_grad for each in given) or shared.requires_grad()):
            raise Left(None)
        if module.training and shared.drops():
            raise Left(None)
        if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
            raise Left("autocast is on")
        run = self._kind(module).call
        assert run is not None
        takes(_takes(run, args, kwargs))
        return run(shared.network, module, *args, **kwargs)

    def told(self, reason: str) -> None:
        """The user knows this reason already."""
        self.whole.warned.add(reason)

    def leave(self, reason: str | None) -> None:
        """Notes that a call was the library's own, and warns of each reason once."""
        note(self.name, reason, self.whole.warned, depth=5)

    def _kind(self, module: nn.Module) -> Converter:
        kind = converter(module) if self._part is None else CONVERTERS[self._part.kind.__name__].parts[self._part.path]
        assert kind is not None
        return kind

    def _ready(self, module: nn.Module) -> Shared:
        """The network for the configuration that the module has now."""
        config: Any = module.config if self._part is None else self._part.config
        if self._shared is None or self._config is not config:
            with self._lock:
                if self._shared is None or (self._config is not config and dict(self._config) != dict(config)):
                    self._shared = self._build(module)
                self._config = config
        return self._shared

    def _build(self, module: nn.Module) -> Shared:
        part = Part(type(module), module.config, "") if self._part is None else self._part  # type: ignore[arg-type]
        build = self._kind(module).build
        assert build is not None
        with torch.device("meta"):
            network = build(part.config)
        network.rewrites = self._rewrites  # type: ignore[assignment]
        return Shared(module, network, _made_anew(part))

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversion:
        module = self.module()
        copied, whole = memo.get(id(module)), copy.deepcopy(self.whole, memo)
        made = Conversion.__new__(Conversion)
        memo[id(self)] = made
        made.__setstate__((copied, whole, self._rewrites, self._part, self._ended))
        return made

    def __getstate__(self) -> tuple[Any, ...]:
        return self.module(), self.whole, self._rewrites, self._part, self._ended

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        module, self.whole, self._rewrites, self._part, self._ended = state
        self._module = weakref.ref(nn.Module() if module is None else module)
        self._reset()
        self.whole.add(self)


class Entry(Forward):
    """The forward of a converted module."""

    def __init__(self, owner: nn.Module, conversion: Conversion) -> None:
        super().__init__(owner)
        self._conversion = conversion

    @property
    def conversion(self) -> Conversion:
        return self._conversion

    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return self._conversion.call(args, kwargs)
        except Left as left:
            reason = left.reason
        result = self.original(*args, **kwargs)
        # Of what the library has refused it has told itself.
        self._conversion.leave(reason)
        return result

    def undo(self) -> None:
        self._conversion.end()

    def copied(self, owner: nn.Module, memo: dict[int, Any]) -> Any:
        if id(self._conversion.module()) not in memo:
            # The forward is copied without its owner.
            return types.MethodType(type(owner).forward, owner)
        return Entry(owner, copy.deepcopy(self._conversion, memo))

    def arguments(self) -> tuple[Any, ...]:
        return (self._conversion,)


def entry(module: nn.Module) -> Entry | None:
    """Our forward of a converted module."""
    found = forward(module)
    return found if isinstance(found, Entry) else None


def _made_anew(part: Part) -> dict[str, Facts]:
    """What the class makes of its configuration."""
    names = inspect.signature(part.kind.__init__).parameters
    config = {name: value for name, value in part.config.items() if name in names}
    with torch.device("meta"):
        return facts(part.kind(**config).get_submodule(part.path))


def _takes(run: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the arguments are some that it knows, and all that it needs."""
    names, needed = _parameters(run)
    given = {*names[: len(args)], *kwargs}
    return len(given) == len(args) + len(kwargs) and needed <= given <= {*names}


@cache
def _parameters(run: Call) -> tuple[tuple[str, ...], frozenset[str]]:
    known = list(inspect.signature(run).parameters.values())[2:]
    return tuple(p.name for p in known), frozenset(p.name for p in known if p.default is p.empty)
