"""A module of the library's whose calls run on a network of ours: its `forward`, and the way back."""

from __future__ import annotations

import inspect
import threading
import types
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.convert import Left, converter
from fastdiff.models.rewrites import Rewrites
from fastdiff.models.sharing import Facts, Shared, facts
from fastdiff.ops import networks

_SLOTS = ("forward", "_old_forward")
"""Where a module's own forward is looked up; the second is where the library's hooks keep it."""


class Conversion:
    """One module of the library's and the network that stands for it.

    What was computed from its parameters is forgotten when a layer is exchanged or a parameter gets other data. Writing
    through `weight.data[...]` leaves no trace: `refresh` says that it happened.
    """

    def __init__(self, module: nn.Module, name: str, rewrites: Rewrites) -> None:
        self._module, self.name, self._rewrites = weakref.ref(module), name, rewrites
        self.enabled = True
        self._reset()

    def _reset(self) -> None:
        self._shared: Shared | None = None
        self._config: Any = None
        self._lock = threading.Lock()
        self._warned: set[str] = set()

    def install(self) -> None:
        """Puts our calls into the module. Raises InputError if the configuration is not supported."""
        module = self.module()
        assert module is not None
        self._ready(module)
        for path in self._calls(module):
            owner = module.get_submodule(path)
            slot = "_old_forward" if "_old_forward" in vars(owner) else "forward"
            setattr(owner, slot, Entry(self, owner, path))
        networks.watch(self)

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

    def module(self) -> nn.Module | None:
        return self._module()

    def copies(self) -> int:
        return 0 if self._shared is None else self._shared.copies()

    def obstacle(self) -> str | None:
        """Why the network cannot stand for the module as both are now."""
        module = self.module()
        assert module is not None
        kind = converter(module)
        assert kind is not None
        return self._ready(module).sync(module) or kind.obstacle(module)

    def call(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the forward at that path gives. Raises Left where the library's own has to."""
        module = self.module()
        if module is None or not self.enabled:
            raise Left(None)
        shared = self._ready(module)
        reason = self.obstacle()
        if reason is not None:
            raise Left(reason)
        if torch.is_grad_enabled() and (_require_grad((args, kwargs)) or shared.requires_grad()):
            raise Left(None)
        if module.training and shared.drops():
            raise Left(None)
        if torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu"):
            raise Left("autocast is on")
        return self._calls(module)[path](shared.network, module, *args, **kwargs)

    def leave(self, reason: str | None) -> None:
        """Notes that a call was the library's own, and warns of each reason once."""
        if reason is None:
            return
        networks.leave(self.name, reason, calls=1)
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(f"fastdiff: {self.name} runs as before: {reason}", stacklevel=5)

    def _calls(self, module: nn.Module) -> Any:
        kind = converter(module)
        assert kind is not None
        return kind.calls

    def _ready(self, module: nn.Module) -> Shared:
        """The network for the configuration that the module has now."""
        config = module.config
        if self._shared is None or self._config is not config:
            with self._lock:
                if self._shared is None or (self._config is not config and dict(self._config) != dict(config)):
                    self._shared = self._build(module)
                self._config = config
        return self._shared

    def _build(self, module: nn.Module) -> Shared:
        kind = converter(module)
        assert kind is not None
        with torch.device("meta"):
            network = kind.build(module.config)  # type: ignore[arg-type]
        network.rewrites = self._rewrites  # type: ignore[assignment]
        return Shared(module, network, _made_anew(module))

    def __deepcopy__(self, memo: dict[int, Any]) -> Conversion:
        module = self.module()
        copied = memo.get(id(module))
        made = Conversion.__new__(Conversion)
        memo[id(self)] = made
        made.__setstate__((copied, self.name, self._rewrites, self.enabled))
        return made

    def __getstate__(self) -> tuple[Any, ...]:
        return self.module(), self.name, self._rewrites, self.enabled

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        module, self.name, self._rewrites, self.enabled = state
        self._module = weakref.ref(nn.Module() if module is None else module)
        self._reset()
        networks.watch(self)


class Entry:
    """The `forward` of a converted module, or of a module inside it: an attribute of the object, not of its class."""

    fastdiff_conversion: Conversion

    def __init__(self, conversion: Conversion, owner: nn.Module, path: str) -> None:
        self.fastdiff_conversion, self._path = conversion, path
        self._owner = weakref.ref(owner)
        self.__signature__ = inspect.signature(self.original)

    @property
    def original(self) -> Any:
        """The library's own forward."""
        owner = self._owner()
        if owner is None:
            raise ReferenceError("fastdiff: this is the forward of a network that is there no more")
        return types.MethodType(type(owner).forward, owner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return self.original(*args, **kwargs)
        try:
            return self.fastdiff_conversion.call(self._path, args, kwargs)
        except Left as left:
            self.fastdiff_conversion.leave(left.reason)
        return self.original(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        import copy

        owner, module = self._owner(), self.fastdiff_conversion.module()
        copied = memo.get(id(owner), owner)
        if id(module) not in memo:
            # The part is copied without the whole.
            return types.MethodType(type(owner).forward, copied)
        return Entry(copy.deepcopy(self.fastdiff_conversion, memo), copied, self._path)

    def __getstate__(self) -> tuple[Any, ...]:
        return self.fastdiff_conversion, self._owner(), self._path

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.__init__(*state)  # type: ignore[misc]


def entry(module: nn.Module) -> Entry | None:
    """Our forward of a module, if it has one."""
    return next((value for slot in _SLOTS if isinstance(value := vars(module).get(slot), Entry)), None)


def remove(module: nn.Module) -> bool:
    """Gives a module and those inside it their own forwards back; whether there was something to undo."""
    found = False
    for inner in module.modules():
        for slot in _SLOTS:
            value = vars(inner).get(slot)
            if isinstance(value, Entry):
                found = True
                value.fastdiff_conversion.enabled = False
                networks.forget(value.fastdiff_conversion)
                if slot == "forward":
                    delattr(inner, slot)
                else:
                    setattr(inner, slot, types.MethodType(type(inner).forward, inner))
    return found


def _made_anew(module: nn.Module) -> dict[str, Facts]:
    """What the module's class makes of its configuration."""
    names = inspect.signature(type(module).__init__).parameters
    config = {name: value for name, value in module.config.items() if name in names}  # type: ignore[union-attr,operator]
    with torch.device("meta"):
        return facts(type(module)(**config))


def _require_grad(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.requires_grad
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return False
    return any(map(_require_grad, _as_iterable(value)))


def _as_iterable(value: Any) -> Iterable[Any]:
    return value
