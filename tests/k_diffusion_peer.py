"""k-diffusion as a peer to compare with: its samplers and wrappers, without the parts that need more than they do."""

import importlib
import sys
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import NamedTuple

import pytest

PACKAGE = "k_diffusion"
# What k_diffusion.utils imports for its image conversions, which no sampler calls.
VISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


class Peer(NamedTuple):
    sampling: ModuleType
    external: ModuleType


def load() -> Peer:
    """k_diffusion.sampling and k_diffusion.external; an error where k-diffusion is not installed.

    k_diffusion/__init__.py imports its training code as well, which needs packages that sampling does not: a bare
    package with the same path stands in for it, and empty modules for torchvision while k_diffusion.utils is imported.
    """
    if not isinstance(sys.modules.get(f"{PACKAGE}.external"), ModuleType):
        spec = PathFinder.find_spec(PACKAGE)
        if spec is None or spec.submodule_search_locations is None:
            raise ModuleNotFoundError("k-diffusion is not installed; make test installs it")
        _import_bare(spec)
    return Peer(sys.modules[f"{PACKAGE}.sampling"], sys.modules[f"{PACKAGE}.external"])


def _import_bare(spec: ModuleSpec) -> None:
    package = ModuleType(PACKAGE)
    package.__path__ = list(spec.submodule_search_locations or [])
    package.__spec__ = spec
    sys.modules[PACKAGE] = package
    with pytest.MonkeyPatch.context() as patch:
        parent = None
        for name in VISION:
            module = ModuleType(name)
            patch.setitem(sys.modules, name, module)
            if parent is not None:
                setattr(parent, name.rpartition(".")[2], module)
            parent = module
        importlib.import_module(f"{PACKAGE}.utils")
    for name in ("sampling", "external"):
        importlib.import_module(f"{PACKAGE}.{name}")
