"""Writing files whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from fastdiff.errors import InputError


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace `path` by `content` in one step: a reader, or a machine that stops, sees the old file or the new one.

    Errors: InputError where the folder does not exist or cannot be written; the old file is then untouched.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        try:
            with partial.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror}); choose a path you can write to") from error
