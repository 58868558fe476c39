"""Counter-based noise: (seed of the sample, stream, step, element) -> value.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). A sample's
noise depends on its own seed only, never on the batch, the device or the number of processes.
"""

from __future__ import annotations

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

    Errors: InputError if a seed is not an integer in [-2^63, 2^64).
    """
    values = []
    for index, seed in enumerate(seeds):
        if isinstance(seed, bool) or not hasattr(seed, "__index__"):
            raise InputError(f"seeds[{index}]: expected an integer, got {seed!r}; pass one integer per sample")
        value = int(seed)
        if not -(2**63) <= value < 2**64:
            raise InputError(f"seeds[{index}]: expected an integer of at most 64 bits, got {value}")
        values.append(value - 2**64 if value >= 2**63 else value)
    if not values:
        raise InputError("seeds: expected at least one integer, got none")
    return torch.tensor(values, dtype=torch.int64, device=device)
