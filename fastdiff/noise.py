"""Counter-based noise: (seed of the sample, stream, step, element) -> value.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). A sample's
noise depends on its own seed only, never on the batch, the device or the number of processes.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch

from fastdiff.errors import InputError

STREAM_INITIAL = 0
"""Stream of x_T, the sample's starting noise."""

STREAM_STEP = 1
"""Stream of the noise that stochastic samplers add; the counter's step is the row of the table."""

STREAM_TRAIN = 2
"""Stream of the noise that training adds to the data."""


def seed_tensor(seeds: Iterable[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Seeds as an int64 tensor (N,); a seed in [2^63, 2^64) keeps its 64 bits.

    Errors: InputError if seeds is not a list of integers, is empty, or holds one outside [-2^63, 2^64).
    """
    values = integers("seeds", seeds)
    if not values:
        raise InputError("seeds: expected at least one integer, got none; pass one per sample")
    for index, value in enumerate(values):
        if not -(2**63) <= value < 2**64:
            raise InputError(
                f"seeds[{index}]: expected an integer of at most 64 bits, got {value}; pass one from -2^63 to 2^64 - 1"
            )
    words = [value - 2**64 if value >= 2**63 else value for value in values]
    return torch.tensor(words, dtype=torch.int64, device=device)


def integers(name: str, values: Iterable[int]) -> list[int]:
    """The values of an argument that has one integer per sample.

    Errors: InputError for a single number, for text, and for an item that is not an integer.
    """
    if isinstance(values, str | bytes) or not _iterable(values):
        raise InputError(f"{name}: expected one integer per sample, got {values!r}; pass a list or a range of them")
    return [_integer(f"{name}[{index}]", item) for index, item in enumerate(values)]


def _iterable(values: object) -> bool:
    try:
        iter(values)  # type: ignore[call-overload]
    except TypeError:
        return False  # a tensor without dimensions too, though it has __iter__
    return True


def _integer(name: str, value: object) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise InputError(f"{name}: expected an integer, got {value!r}; pass one integer per sample")
