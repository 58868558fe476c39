"""Options of a method as the command line takes them, NAME=VALUE."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fastdiff import samplers
from fastdiff.errors import InputError

BUILD_OPTIONS = ("clip", "dynamic_threshold", "dynamic_maximum")
"""What `fastdiff.samplers.build` takes for every method, besides the grid's options."""
ADAPTIVE_OPTIONS = ("clip", "sigma_min", "sigma_max", "final_sigma")
"""What `fastdiff.run_adaptive` takes for every method."""


def parse(texts: Sequence[str], method: str) -> dict[str, Any]:
    """From NAME=VALUE: each value a number, true, false, null, a list in brackets, or else a word.

    Errors: InputError for an unknown method, and for a name that is none of its options.
    """
    if method in samplers.ADAPTIVE:
        known = (*samplers.ADAPTIVE[method].options, *ADAPTIVE_OPTIONS)
    else:
        known = (*samplers.find(method).options, *BUILD_OPTIONS, *samplers.GRID_OPTIONS)
    options = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or name not in known:
            raise InputError(f"option: expected NAME=VALUE with a NAME among {', '.join(known)}, got {text!r}")
        try:
            options[name] = json.loads(value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def plain(value: Any) -> str:
    """A default value as people write it."""
    return "automatic" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
