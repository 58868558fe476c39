"""Which backend runs a call, why the others do not, and the record of both."""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastdiff import config
from fastdiff.errors import BackendError, InputError
from fastdiff.ops import native, networks, torch_library, triton
from fastdiff.ops.registry import OPERATORS, Backend, Operator


class _Reference:
    """The operator's specification as a backend of its own: it runs everything."""

    name = "reference"

    def __init__(self, operator: Operator) -> None:
        self.run = operator.reference

    def unavailable(self) -> str | None:
        return None

    def supports(self, *args: Any) -> str | None:
        return None

    def cedes(self, *args: Any) -> bool:
        return False


def _candidates(operator: Operator) -> tuple[Backend, ...]:
    offered = [module.BACKENDS.get(operator.name) for module in (native, triton, torch_library)]
    return (*filter(None, offered), _Reference(operator))


BACKENDS: dict[str, tuple[Backend, ...]] = {name: _candidates(operator) for name, operator in OPERATORS.items()}
"""For each operator its backends, in the order of preference."""

_used: Counter[tuple[str, str]] = Counter()
_fallbacks: dict[tuple[str, str], str] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class Report:
    """What ran since the process started (or the last `report(reset=True)`).

    calls: {(operator, backend): number of calls}; fallbacks: {(operator, backend passed over): reason}, for calls that
    ended on the reference. arenas: memory that networks hand on from call to call.

    networks: {name: bytes of what is kept besides the parameters}, for each network that `accelerate` converted and
    that is still there. left: {(name, reason): calls that ran on the network's own code}, 0 where it was not converted.
    """

    calls: dict[tuple[str, str], int]
    fallbacks: dict[tuple[str, str], str]
    networks: dict[str, int] = field(default_factory=dict)
    left: dict[tuple[str, str], int] = field(default_factory=dict)
    arenas: native.Arenas = field(default_factory=native.Arenas)

    def __str__(self) -> str:
        lines = [f"{operator}: {backend} x {count}" for (operator, backend), count in sorted(self.calls.items())]
        lines += [f"{operator}: not {backend}: {reason}" for (operator, backend), reason in self.fallbacks.items()]
        lines = lines or ["no operator has run"]
        lines += [f"{name}: accelerated, {size} bytes of copies" for name, size in self.networks.items()]
        lines += [
            f"{name}: left as it was{f', {calls} calls' if calls else ''}: {reason}"
            for (name, reason), calls in self.left.items()
        ]
        use = self.arenas
        if use.hits or use.misses:
            lines.append(
                f"arenas: {use.bytes} bytes held, {use.misses} blocks from the system, {use.hits} handed out again"
            )
        return "\n".join(lines)


def report(*, reset: bool = False) -> Report:
    """Calls of each operator by backend, each automatic fallback with its reason, and what became of networks."""
    copies, left = networks.take(reset=reset)
    with _lock:
        if plain := native.take_plain_steps():
            _used["sampler_step", "native"] += plain
        if plain := native.take_plain_norms():
            _used["group_norm_silu", "native"] += plain
        result = Report(dict(_used), dict(_fallbacks), copies, left, native.arenas(reset=reset))
        if reset:
            _used.clear()
            _fallbacks.clear()
    return result


def choose(name: str, args: tuple[Any, ...], *, record: bool = True) -> Backend:
    """The backend for this call. Errors: BackendError if the one that was demanded cannot run it.

    Triton's interpreter is for checking kernels, not for speed: it runs only where it is demanded.
    """
    demanded = config.forced_backend(name)
    if demanded is not None:
        return _demand(name, demanded, args)
    ceding = None
    for backend in BACKENDS[name]:
        if backend.supports(*args) is None and not (backend.name == "triton" and config.triton_interpreted()):
            if backend.cedes(*args):
                ceding = ceding or backend
                continue
            if backend.name == "reference" and ceding is not None:
                return ceding
            if backend.name == "reference" and record:
                _record_fallback(name, args)
            return backend
    raise AssertionError("unreachable: the reference supports every call")


def _demand(name: str, demanded: str, args: tuple[Any, ...]) -> Backend:
    for backend in BACKENDS[name]:
        if backend.name == demanded:
            reason = backend.supports(*args)
            if reason is None:
                return backend
            raise BackendError(f"{name}: backend {demanded!r} was demanded but cannot run this call: {reason}")
    known = ", ".join(backend.name for backend in BACKENDS[name])
    raise BackendError(f"{name}: backend {demanded!r} was demanded but the operator has only: {known}")


def _record_fallback(name: str, args: tuple[Any, ...]) -> None:
    for backend in BACKENDS[name][:-1]:
        key = (name, backend.name)
        if key in _fallbacks:
            continue
        reason = backend.supports(*args)
        if reason is not None:
            with _lock:
                _fallbacks[key] = reason
            if backend.name == "native":
                warnings.warn(f"fastdiff: {name} runs on the reference, not on native code: {reason}", stacklevel=4)


def explain(name: str, args: tuple[Any, ...]) -> str:
    """For this call, the backend that would run it and why each other would not."""
    chosen = choose(name, args, record=False).name
    lines = [f"{name}: {chosen}"]
    for backend in BACKENDS[name]:
        if backend.name != chosen:
            reason = backend.supports(*args) or "able, but not preferred"
            lines.append(f"  not {backend.name}: {reason}")
    return "\n".join(lines)


def _refuse_grad(name: str, args: tuple[Any, ...]) -> None:
    for value in args:
        if value is not None and isinstance(value, Tensor) and value.requires_grad:
            raise InputError(
                f"{name}: an input requires grad and this operator has no gradient; "
                "call it under torch.no_grad(), or inside fastdiff.use_backend('reference') to differentiate"
            )


def _run(name: str, args: tuple[Any, ...]) -> Any:
    if torch.is_grad_enabled():
        _refuse_grad(name, args)
    backend = choose(name, args)
    _used[name, backend.name] += 1
    return backend.run(*args)


_library = torch.library.Library("fastdiff", "DEF")


def _register(operator: Operator) -> Callable[..., Any]:
    _library.define(operator.name + operator.schema)
    _library.impl(operator.name, lambda *args: _run(operator.name, args), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdiff::{operator.name}", operator.fake, lib=_library)
    return getattr(torch.ops.fastdiff, operator.name).default


REGISTERED: dict[str, Callable[..., Any]] = {name: _register(operator) for name, operator in OPERATORS.items()}
"""The registered operators, `torch.ops.fastdiff.<name>.default`."""

_is_compiling = torch.compiler.is_compiling
_is_tracing = torch._C._is_tracing
_dispatch_modes = torch._C._len_torch_dispatch_stack
_is_profiling = torch.autograd._profiler_enabled


def plain_step(
    x: Tensor,
    model_output: Tensor,
    table: Tensor,
    row: int,
    anchor: Tensor | None,
    history: tuple[Tensor, ...],
    noise: Tensor | None,
    new_history: bool,
    new_anchor: bool,
) -> Any:
    """What the extension's `plain_step` gives for these tensors; None where the call has to take the long way.

    That way costs about 6 us more, which is what a small step takes: every check in Python, the choice of a backend.
    """
    if config.detours or _is_compiling() or _is_tracing():
        return None
    step = native.plain_step()
    if step is None:
        return None
    return step(x, model_output, table, row, anchor, history, noise, new_history, new_anchor)


def plain_norm(*args: Any) -> Any:
    """What the extension's `plain_norm` gives for these arguments; None where the call has to take the long way, which
    takes as long as a small norm."""
    if _is_tracing() or config.forced_backend("group_norm_silu") not in (None, "native"):
        return None
    norm = native.plain_norm()
    return None if norm is None else norm(*args)


def call(name: str, args: tuple[Any, ...]) -> Any:
    """The registered operator; its implementation directly where nothing but a plain call can be seen.

    Going through PyTorch's dispatcher costs about 5 us, half of a small step. Only compilation, tracing, tensor
    subclasses (fake tensors among them), meta tensors and the profiler need it.
    """
    first = args[0]
    graph = _is_compiling() or _is_tracing()
    if graph or type(first) is not Tensor or first.is_meta or _dispatch_modes() or _is_profiling():
        return REGISTERED[name](*args)
    return _run(name, args)
