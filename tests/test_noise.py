"""Seeds: which integers are taken, and what is said of everything else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastdiff import InputError
from fastdiff.noise import seed_tensor


@pytest.mark.parametrize(
    "seeds",
    [[3, 4], (3, 4), range(3, 5), iter([3, 4]), torch.tensor([3, 4]), np.array([3, 4], dtype=np.uint8)],
    ids=lambda seeds: type(seeds).__name__,
)
def test_any_integers_are_seeds(seeds):
    found = seed_tensor(seeds)
    assert (found.dtype, found.tolist()) == (torch.int64, [3, 4])


def test_a_seed_keeps_its_64_bits():
    assert seed_tensor([-(2**63), 2**63, 2**64 - 1]).tolist() == [-(2**63), -(2**63), -1]


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        (3, "seeds: expected one integer per sample, got 3; pass a list or a range of them"),
        (3.5, "seeds: expected one integer per sample, got 3.5; pass"),
        (None, "seeds: expected one integer per sample, got None; pass"),
        ("12", "seeds: expected one integer per sample, got '12'; pass"),
        (b"12", "seeds: expected one integer per sample, got b'12'; pass"),
        (torch.tensor(3), r"seeds: expected one integer per sample, got tensor\(3\); pass"),
        ([], "seeds: expected at least one integer, got none; pass one per sample"),
        ([1, "2"], r"seeds\[1\]: expected an integer, got '2'; pass one integer per sample"),
        ([1, 2.0], r"seeds\[1\]: expected an integer, got 2.0; pass"),
        ([True], r"seeds\[0\]: expected an integer, got True; pass"),
        (torch.tensor([1.5]), r"seeds\[0\]: expected an integer, got tensor\(1.5000\); pass"),
        (torch.zeros(2, 3, dtype=torch.int64), r"seeds\[0\]: expected an integer, got tensor"),
        ([0, 2**64], r"seeds\[1\]: expected an integer of at most 64 bits, got 18446744073709551616; pass"),
        ([-(2**63) - 1], r"seeds\[0\]: expected an integer of at most 64 bits, got -9223372036854775809; pass"),
    ],
    ids=str,
)
def test_what_is_no_seed_is_refused(seeds, message):
    with pytest.raises(InputError, match=message):
        seed_tensor(seeds)
