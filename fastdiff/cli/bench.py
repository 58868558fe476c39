"""`fastdiff bench`: runs the benchmarks of the source checkout that this package is installed from."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import fastdiff
from fastdiff.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _benchmarks().add_arguments(parser)


def main(arguments: argparse.Namespace) -> int:
    return int(_benchmarks().main(arguments))


def _benchmarks() -> ModuleType:
    """The module benchmarks.run. The checkout is not put on sys.path: its folder kernels/ would hide a package."""
    if "benchmarks" not in sys.modules:
        root = Path(fastdiff.__file__).resolve().parent.parent
        folder = root / "benchmarks"
        spec = spec_from_file_location("benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)])
        if spec is None or spec.loader is None or not (folder / "run.py").is_file():
            raise InputError(
                f"bench: expected the source checkout around {root / 'fastdiff'}, which has no benchmarks; "
                "clone the repository and use 'make bench' there"
            )
        module = module_from_spec(spec)
        sys.modules["benchmarks"] = module
        spec.loader.exec_module(module)
    return import_module("benchmarks.run")
