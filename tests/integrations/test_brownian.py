"""Our Brownian paths against torchsde's: the same seeds give the same noise."""

import copy
import random
from functools import partial
from itertools import pairwise

import diffusers.schedulers.scheduling_dpmsolver_sde as theirs
import pytest
import torch
import torchsde
from drop_in import relative

from fastdiff.errors import InputError
from fastdiff.integrations.brownian import BrownianPath, BrownianTreeNoiseSampler

SHAPE = (2, 3, 4, 5)
ENDS = {"usual": (0.029167, 14.614642), "wide": (0.0020001, 80.0), "unit": (0.0, 1.0), "flow": (0.001, 0.9997)}


def spans(low: float, high: float) -> list[tuple[float, float]]:
    """The whole, its ends, short and long ones."""
    chosen = random.Random(0)
    times = [chosen.uniform(low, high) for _ in range(24)]
    found = [(low, high), (low, times[0]), (times[1], high), (times[2], times[2] + 1e-5), (low + 1e-6, low + 2e-6)]
    found += [(times[3], high + 1.0), (0.5 * (low + high), high), (round(times[4], 6), times[5])]
    return [tuple(sorted(span)) for span in (*found, *zip(times[::2], times[1::2], strict=True))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("ends", ENDS.values(), ids=ENDS)
@pytest.mark.filterwarnings("ignore:Should have")
def test_increments(ends, dtype):
    for seed in (0, 7, 2**40 + 3):
        path = BrownianPath(torch.zeros(SHAPE, dtype=dtype), *ends, seed)
        options = {"size": SHAPE, "dtype": dtype, "entropy": seed, "tol": 1e-6, "pool_size": 24, "halfway_tree": True}
        tree = torchsde.BrownianInterval(t0=ends[0], t1=ends[1], **options)
        for a, b in spans(*ends):
            our, their = path(a, b), tree(a, b)
            assert our.dtype == their.dtype
            assert relative(our, their) < (2e-6 if dtype is torch.float32 else 1e-11), (a, b)


def in_double(path: BrownianPath, *arguments) -> torch.Tensor:
    return path._noise(*arguments).double()


def test_half_is_nearer_to_the_truth():
    """Its normals are of half precision, and only the sum of theirs is as well."""
    for dtype in (torch.float16, torch.bfloat16):
        options = {"size": SHAPE, "dtype": dtype, "entropy": 3, "tol": 1e-6, "pool_size": 24, "halfway_tree": True}
        tree = torchsde.BrownianInterval(t0=0.03, t1=14.0, **options)
        path, wide = (BrownianPath(torch.zeros(SHAPE, dtype=kind), 0.03, 14.0, 3) for kind in (dtype, torch.float64))
        wide._noise = partial(in_double, path)
        for a, b in ((1.0, 2.5), (0.2, 0.4), (3.0, 9.0)):
            exact = wide(a, b)
            assert path(a, b).dtype == dtype
            assert relative(path(a, b), exact) <= relative(tree(a, b), exact)


@pytest.mark.parametrize("seed", [5, [1, 2], None], ids=str)
def test_noise_sampler(seed):
    x, results = torch.zeros(SHAPE), []
    sigmas = torch.tensor([14.6146, 7.3, 1.1, 0.4, 0.0292])
    for kind in (BrownianTreeNoiseSampler, theirs.BrownianTreeNoiseSampler):
        torch.manual_seed(3)
        sampler = kind(x, 0.029167, 14.6146, seed)
        drawn = [sampler(a, b) for a, b in pairwise(sigmas)]
        results.append((*drawn, sampler(0.5, 2.0), torch.rand(3)))
    for our, their in zip(*results, strict=True):
        assert relative(our, their) < 1e-6


def test_as_many_seeds_as_samples():
    with pytest.raises(InputError, match="one for each of 2 samples, got 3"):
        BrownianTreeNoiseSampler(torch.zeros(SHAPE), 0.1, 10.0, [1, 2, 3])


def test_copies():
    sampler = BrownianTreeNoiseSampler(torch.zeros(SHAPE), 0.1, 10.0, 4)
    assert torch.equal(copy.deepcopy(sampler)(3.0, 1.0), sampler(3.0, 1.0))
