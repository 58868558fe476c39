"""The CUDA kernels compiled for the CPU, once a session."""

from __future__ import annotations

import shutil

import cuda_shim
import pytest


@pytest.fixture(scope="session")
def shim_library(tmp_path_factory: pytest.TempPathFactory) -> cuda_shim.Launchers:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not on PATH")
    return cuda_shim.Launchers(cuda_shim.build(tmp_path_factory.mktemp("cuda_shim")))


@pytest.fixture
def shim(shim_library: cuda_shim.Launchers) -> cuda_shim.Launchers:
    """An H200 whose threads run in order."""
    shim_library.device()
    return shim_library
