"""A build without CUDA kernels is no reason to skip where they could be."""

from __future__ import annotations

import backends
import pytest
import torch

from fastdiff.ops import native


def state(monkeypatch: pytest.MonkeyPatch, *, built: bool, gpu: bool, toolkit: bool) -> None:
    monkeypatch.setattr(native, "cuda_built", lambda: built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(backends, "cuda_missing", lambda: None if toolkit else "no toolkit")


def outcome(target: backends.Target) -> type[BaseException] | None:
    """How a test that uses the target ends: pytest's exception, or None."""
    try:
        with target.forced():
            return None
    except (pytest.fail.Exception, pytest.skip.Exception) as ended:
        return type(ended)


@pytest.mark.parametrize(
    ("built", "gpu", "toolkit", "expected"),
    [
        (True, True, True, None),
        (True, True, False, None),
        (False, True, True, pytest.fail.Exception),
        (False, True, False, pytest.skip.Exception),
        (False, False, True, pytest.skip.Exception),
    ],
)
def test_a_wrong_build_fails(
    monkeypatch: pytest.MonkeyPatch, built: bool, gpu: bool, toolkit: bool, expected: type[BaseException] | None
) -> None:
    state(monkeypatch, built=built, gpu=gpu, toolkit=toolkit)
    assert outcome(backends.Target("native", "cuda")) is expected
    assert outcome(backends.NATIVE) is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch could have CUDA kernels")
def test_set_up_says_what_is_missing() -> None:
    assert backends.cuda_missing() == "PyTorch is built without CUDA"
