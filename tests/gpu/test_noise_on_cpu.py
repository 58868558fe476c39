"""The CUDA kernels of philox_normal and add_noise, run on the CPU by the shim."""

from __future__ import annotations

import pytest
import torch
from cuda_shim import ORDERS, Launchers
from inputs import DTYPES, LAYOUTS, normal
from noise_truth import normals_truth
from tolerance import assert_close_to_truth

from fastdiff.ops import reference

SEEDS = torch.tensor([5, -6, 2**40 + 1])
STEP, STREAM = 2**32 - 3, 2
# Whole chunks of eight; a remainder; a channel that is a multiple of four elements but no chunk; one element.
SHAPES = {"chunks": (3, 4, 8, 12), "remainder": (2, 3, 5, 3), "quads": (2, 5, 2, 6), "one_element": (1, 1, 1, 1)}


def unaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_philox_normal(shim: Launchers, shape: str, dtype: str) -> None:
    sizes = SHAPES[shape]
    seeds = SEEDS[: sizes[0]]
    result = shim.philox_normal(seeds, list(sizes), STEP, STREAM, DTYPES[dtype])
    plain = reference.philox_normal(seeds, sizes, STEP, STREAM, DTYPES[dtype])
    assert_close_to_truth(result, normals_truth(seeds, sizes, STEP, STREAM), plain)


@pytest.mark.parametrize("order", ORDERS)
def test_philox_normal_of_many_blocks(shim: Launchers, order: str) -> None:
    """More elements a sample than a block of threads draws, so that a sample spans blocks and a block spans samples."""
    shim.device(order)
    result = shim.philox_normal(SEEDS, [3, 3000], 1, 0, torch.float32)
    plain = reference.philox_normal(SEEDS, (3, 3000), 1, 0, torch.float32)
    assert_close_to_truth(result, normals_truth(SEEDS, (3, 3000), 1), plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("noise_dtype", ["drawn", *DTYPES])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_add_noise(shim: Launchers, shape: str, dtype: str, noise_dtype: str, layout: str) -> None:
    sizes, like = SHAPES[shape], {"memory_format": LAYOUTS[layout]}
    x = normal(*sizes, seed=1, dtype=DTYPES[dtype]).contiguous(**like)
    alpha, sigma = normal(sizes[0], seed=2), normal(sizes[0], seed=3)
    if noise_dtype == "drawn":  # as philox_normal draws, which is held to its own truth
        seeds, noise = SEEDS[: sizes[0]], None
        exact = shim.philox_normal(seeds, list(sizes), STEP, STREAM, torch.float32)
    else:
        seeds, noise = None, normal(*sizes, seed=4, dtype=DTYPES[noise_dtype]).contiguous(**like)
        exact = noise
    result = shim.add_noise(x, alpha, sigma, noise, seeds, STEP, STREAM)
    truth = reference.add_noise(x.double(), alpha.double(), sigma.double(), exact.double(), None, 0, 0)
    plain = reference.add_noise(x, alpha, sigma, exact, None, 0, 0)
    assert result.stride() == plain.stride()
    assert_close_to_truth(result, truth, plain)


def test_unaligned_addresses(shim: Launchers) -> None:
    x, noise = (unaligned(normal(2, 32, seed=seed, dtype=torch.float16)) for seed in (1, 2))
    alpha, sigma = normal(2, seed=3), normal(2, seed=4)
    result = shim.add_noise(x, alpha, sigma, noise, None, 0, 0)
    assert torch.equal(result, reference.add_noise(x, alpha, sigma, noise, None, 0, 0))
