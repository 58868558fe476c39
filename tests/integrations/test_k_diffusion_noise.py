"""Noise samplers, noise levels and the small functions beside the samplers, against k-diffusion's; bit for bit."""

import sys

import pytest
import torch
from k_diffusion_drop_in import SHAPE, karras, start
from k_diffusion_peer import load

from fastdiff.errors import InputError
from fastdiff.integrations.k_diffusion import sampling as ours

theirs = load().sampling


@pytest.mark.parametrize("seed", [None, 12, [3, 4]], ids=str)
@pytest.mark.parametrize("transform", [None, torch.log, torch.neg], ids=["identity", "log", "falling"])
def test_brownian_noise(seed, transform):
    """The same seeds, and where there are none the same draw of one, give the same path."""
    options = {} if transform is None else {"transform": transform}
    spans = [(20.0, 5.0), (5.0, 1.0), (20.0, 1.0), (1.0, 7.0)]
    results = []
    for module in (ours, theirs):
        torch.manual_seed(9)
        sampler = module.BrownianTreeNoiseSampler(start(), 0.1, 20.0, seed=seed, **options)
        results.append([*(sampler(torch.tensor(a), torch.tensor(b)) for a, b in spans), torch.get_rng_state()])
    for mine, other in zip(*results, strict=True):
        assert torch.equal(mine, other)


def test_brownian_tree_with_a_start():
    w0 = torch.full(SHAPE, 2.0)
    tree, plain = (ours.BatchedBrownianTree(start(), 0.0, 1.0, seed=1, **options) for options in ({"w0": w0}, {}))
    assert torch.equal(tree(0.0, 0.5), plain(0.0, 0.5))
    assert torch.equal(tree(0.5, 0.0), -tree(0.0, 0.5))


def test_brownian_noise_wants_a_seed_a_sample():
    with pytest.raises(InputError, match="seed: expected a number or one for each of 2 samples, got 3"):
        ours.BrownianTreeNoiseSampler(start(), 0.1, 20.0, seed=[1, 2, 3])


def test_brownian_noise_without_torchsde(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchsde", None)
    with pytest.raises(InputError, match=r"needs torchsde; pip install 'fastdiff-engine\[brownian\]'"):
        ours.sample_dpmpp_2m_sde(lambda x, sigma: x, start(), karras(3), disable=True)


STATES = {
    "float32": start(),
    "float16": start(1.0, torch.float16),
    "float64": start(1.0, torch.float64),
    "channels last": start().contiguous(memory_format=torch.channels_last),
    "transposed": start().transpose(1, 3),
    "few": start().flatten()[:7],
}


@pytest.mark.parametrize("x", STATES.values(), ids=STATES)
def test_default_noise(x):
    results = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        results.append((module.default_noise_sampler(x)(None, None), torch.get_rng_state()))
    (mine, state), (other, their_state) = results
    assert torch.equal(mine, other)
    assert mine.dtype == other.dtype
    assert mine.stride() == other.stride()
    assert torch.equal(state, their_state)


LEVELS = {
    "get_sigmas_karras": [(7, 0.1, 10.0), (1, 0.1, 10.0), (12, 0.02, 80.0, 5.0)],
    "get_sigmas_exponential": [(7, 0.1, 10.0), (1, 0.1, 10.0), (12, 0.02, 80.0)],
    "get_sigmas_polyexponential": [(7, 0.1, 10.0), (1, 0.1, 10.0), (12, 0.02, 80.0, 2.0)],
    "get_sigmas_vp": [(7,), (1,), (12, 15.0, 0.2, 1e-2)],
}


@pytest.mark.parametrize(("name", "arguments"), [(name, each) for name, several in LEVELS.items() for each in several])
def test_levels(name, arguments):
    assert torch.equal(getattr(ours, name)(*arguments), getattr(theirs, name)(*arguments))


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("count", [2.5, True, -1, "7", None])
def test_levels_want_a_count(name, count):
    with pytest.raises(InputError, match="n: expected a whole number"):
        getattr(ours, name)(count, *LEVELS[name][0][1:])


@pytest.mark.parametrize("name", ["get_sigmas_exponential", "get_sigmas_polyexponential"])
def test_levels_have_logarithms(name):
    with pytest.raises(InputError, match="sigma_min: expected a positive number, got 0"):
        getattr(ours, name)(5, 0, 10.0)


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0, 1.5])
@pytest.mark.parametrize("numbers", [float, torch.tensor])
def test_ancestral_step(eta, numbers):
    for pair in ((10.0, 3.0), (1.0, 1.0), (80.0, 0.002), (2.0, 0.0)):
        assert ours.get_ancestral_step(*map(numbers, pair), eta=eta) == theirs.get_ancestral_step(
            *map(numbers, pair), eta=eta
        )


def test_to_d():
    x, denoised = start(), start(1.0)
    for sigma in (torch.tensor(3.0), torch.tensor([3.0, 2.0])):
        assert torch.equal(ours.to_d(x, sigma, denoised), theirs.to_d(x, sigma, denoised))
    with pytest.raises(InputError, match="at most target_dims = 4"):
        ours.to_d(x, torch.zeros(1, 1, 1, 1, 1), denoised)
    assert torch.equal(ours.append_zero(x.flatten()), theirs.append_zero(x.flatten()))


def test_linear_multistep_coefficients():
    """Theirs integrates numerically, which is exact for polynomials of so low a degree."""
    t = karras(7).double().numpy()
    for order in (1, 2, 3, 4, 5):
        for i in range(order - 1, 7):
            for j in range(order):
                mine, other = (module.linear_multistep_coeff(order, t, i, j) for module in (ours, theirs))
                assert mine == pytest.approx(other, rel=1e-9)
    with pytest.raises(InputError, match="order: expected at most 2 at step 1, got 3"):
        ours.linear_multistep_coeff(3, t, 1, 0)
