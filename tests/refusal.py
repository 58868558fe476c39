"""A checkpoint that is refused: in one line, which names the file."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastdiff import CheckpointError
from fastdiff.models import load_model


def check_refusal(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
