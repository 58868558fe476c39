"""What every test shares: devices, backends, each worker's share of the cores."""

from __future__ import annotations

import os

import pytest
import torch
from cores import CORES, WORKERS

if WORKERS > 1 and "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(CORES)
    os.environ["OMP_NUM_THREADS"] = str(CORES)  # of the processes that tests start
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    # Read when a kernel file is imported, so the whole session interprets. Ahead-of-time compilation needs it unset and
    # runs in processes of its own (tests/gpu).
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        no_gpu = pytest.mark.skip(reason="no CUDA device; the checks of tests/gpu stand in")
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> object:
    """Fresh tensors hold NaN, so that an element a kernel does not write is seen."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _same_numbers_each_time() -> None:
    """Whatever a test draws, it draws again."""
    torch.manual_seed(0)


@pytest.fixture
def many_threads() -> object:
    """The number of threads may change inside the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count}-threads")
def threads(request: pytest.FixtureRequest, many_threads: object) -> None:
    """The test runs on that many threads."""
    torch.set_num_threads(request.param)
