"""fastdiff: the fastest honest way to sample from a diffusion model."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "explain": "fastdiff.ops",
    "report": "fastdiff.ops",
    "use_backend": "fastdiff.config",
    "run": "fastdiff.engine.run",
    "sample": "fastdiff.engine.sample",
    "load_model": "fastdiff.models.loading",
    "InputError": "fastdiff.errors",
    "BackendError": "fastdiff.errors",
    "CheckpointError": "fastdiff.errors",
}
_MODULES = ("engine", "models", "ops", "samplers", "schedules", "training")
__all__ = sorted([*_PUBLIC, *_MODULES])


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    if name in _MODULES:
        return import_module(f"fastdiff.{name}")
    raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
