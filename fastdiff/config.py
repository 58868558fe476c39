"""Every environment variable and run-time choice, parsed in one place.

FASTDIFF_BACKEND  backend of every operator ("native"), or of some ("attention=triton,sampler_step=reference").
KINETO_LOG_LEVEL  PyTorch's own: what its profiler says; `fastdiff profile` sets it where it is not.
TRITON_INTERPRET  Triton's own switch: 1 runs the Triton kernels in its interpreter, on the CPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from threading import Lock

from fastdiff.errors import InputError

BACKENDS = ("native", "triton", "torch", "reference")
OPERATORS = (
    *("sampler_step", "add_noise", "philox_normal", "group_norm_silu", "attention"),
    *("guidance_weights", "dynamic_threshold", "langevin_step_size"),
    *("geglu", "layer_norm_modulate"),
    *("conv_bias_residual", "upsample_conv"),
)

detours = int(os.environ.get("FASTDIFF_BACKEND", "") not in ("", "native"))
"""How many demands are in force, in any thread, that may send `sampler_step` away from its native backend."""
_counting = Lock()
_forced: ContextVar[Mapping[str, str] | None] = ContextVar("fastdiff_forced_backends", default=None)


def parse_backends(text: str) -> dict[str, str]:
    """FASTDIFF_BACKEND's value as {operator: backend}; a bare backend name stands for every operator."""
    choice: dict[str, str] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        operator, separator, backend = item.partition("=")
        if not separator:
            operator, backend = "*", operator
        names = OPERATORS if operator == "*" else (operator,)
        choice.update(dict.fromkeys(names, backend))
    return _checked(choice)


def _checked(choice: Mapping[str, str]) -> dict[str, str]:
    for operator, backend in choice.items():
        if operator not in OPERATORS:
            raise InputError(f"backend: unknown operator {operator!r}; expected one of {', '.join(OPERATORS)}")
        if backend not in BACKENDS:
            raise InputError(f"backend: unknown backend {backend!r} for {operator}; expected {', '.join(BACKENDS)}")
    return dict(choice)


@cache
def _environment_backends() -> Mapping[str, str]:
    return parse_backends(os.environ.get("FASTDIFF_BACKEND", ""))


def quieten_profiler() -> None:
    """Kineto, which records for PyTorch's profiler, says nothing on the terminal unless KINETO_LOG_LEVEL is set."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@cache
def triton_interpreted() -> bool:
    """Whether Triton's interpreter was asked for when this process started."""
    return os.environ.get("TRITON_INTERPRET", "") not in ("", "0")


def forced_backend(operator: str) -> str | None:
    """The backend that `use_backend` or FASTDIFF_BACKEND demands for this operator, or None."""
    forced = _forced.get()
    return (_environment_backends() if forced is None else forced).get(operator)


@contextmanager
def use_backend(choice: str | Mapping[str, str]) -> Iterator[None]:
    """Force a backend inside the block: "native", or {"attention": "triton"}; nothing falls back.

    "reference" runs plain, differentiable PyTorch. The choice belongs to the current thread or task.

    Errors: InputError for an unknown operator or backend; BackendError from an operator that cannot run so.
    """
    chosen = parse_backends(choice) if isinstance(choice, str) else _checked(choice)
    outer = _forced.get()
    token = _forced.set({**(_environment_backends() if outer is None else outer), **chosen})
    away = chosen.get("sampler_step", "native") != "native"
    _count_detours(away)
    try:
        yield
    finally:
        _count_detours(-away)
        _forced.reset(token)


def _count_detours(change: int) -> None:
    global detours
    with _counting:
        detours += change
