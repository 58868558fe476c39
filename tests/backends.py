"""Where an operator's tests run: each backend on the CPU (Triton in its interpreter), and on a GPU if there is one."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import fastdiff

CUDA = torch.cuda.is_available()


def cuda_missing() -> str | None:
    """Why setup.py could not build the CUDA kernels here."""
    with patch("setuptools.setup"):
        return runpy.run_path(str(Path(__file__).parents[1] / "setup.py"))["cuda_missing"]()


def require_cuda_kernels() -> None:
    """Skip where the extension has no CUDA kernels; fail where it could have them."""
    if fastdiff.ops.native.cuda_built():
        return
    missing = cuda_missing() if torch.cuda.is_available() else "no CUDA device"
    if missing is None:
        pytest.fail("the extension was built without CUDA, though it could have it; set FASTDIFF_CUDA=1 and build")
    pytest.skip(f"the extension was built without CUDA: {missing}")


@dataclass(frozen=True)
class Target:
    """A backend and the device it runs on."""

    backend: str
    device: str

    def __str__(self) -> str:
        return self.backend if self.device == "cpu" else f"{self.backend}-{self.device}"

    @contextmanager
    def forced(self) -> Iterator[None]:
        if self == Target("native", "cuda"):
            require_cuda_kernels()
        with fastdiff.use_backend(self.backend):
            yield

    def move(self, value: Any) -> Any:
        """Tensors, alone or in a tuple or dict, on the device; the rest as it is."""
        if isinstance(value, Tensor):
            return value.to(self.device)
        if isinstance(value, tuple):
            return tuple(self.move(item) for item in value)
        if isinstance(value, dict):
            return {key: self.move(item) for key, item in value.items()}
        return value


NATIVE = Target("native", "cpu")
INTERPRETED = Target("triton", "cuda" if CUDA else "cpu")
DEVICE = {"native": "cpu", "torch": "cpu", "triton": INTERPRETED.device}
"""Of the backends that are no specification."""
ON_GPU = pytest.param(Target("native", "cuda"), id="native-cuda", marks=pytest.mark.gpu)
TARGETS = [pytest.param(target, id=str(target)) for target in (NATIVE, INTERPRETED)] + [ON_GPU]
