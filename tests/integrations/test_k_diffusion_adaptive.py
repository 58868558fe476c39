"""dpm_fast, dpm_adaptive and log_likelihood, which take sigma_min and sigma_max, against k-diffusion's."""

import pytest
import torch
from k_diffusion_drop_in import SHAPE, assert_near, assert_parity, denoiser, distance, network, record, start
from k_diffusion_peer import load

from fastdiff.errors import InputError
from fastdiff.integrations.k_diffusion import sampling as ours

LOW, HIGH = 0.3, 8.0
ADAPTIVE = [
    {},
    {"order": 2},
    {"eta": 0.7, "s_noise": 1.1},
    {"eta": 1.0, "order": 2},
    {"rtol": 0.01, "atol": 0.001},
    {"pcoeff": 0.1, "icoeff": 0.8, "dcoeff": 0.05, "h_init": 0.3, "accept_safety": 0.95},
    {"h_init": -0.1},
]


def given_noise():
    generator = torch.Generator().manual_seed(7)
    return lambda sigma, sigma_next: torch.randn(SHAPE, generator=generator)


@pytest.mark.parametrize("calls", [1, 2, 3, 4, 5, 12, 13])
@pytest.mark.parametrize("options", [{}, {"eta": 0.7, "s_noise": 1.1}, {"eta": 1.0}, {"eta": 1.2}], ids=str)
def test_dpm_fast(calls, options):
    mine = assert_parity("dpm_fast", start(HIGH), LOW, HIGH, calls, **options)
    assert len(mine.calls) == calls


def test_dpm_fast_with_a_noise_sampler():
    assert_parity("dpm_fast", start(HIGH), LOW, HIGH, 7, eta=0.5, noise_sampler=given_noise)


def test_dpm_fast_from_the_data_to_the_noise():
    assert_parity("dpm_fast", start(1.0), HIGH, LOW, 7)


def test_dpm_fast_between_tensors():
    mine = record(ours, "dpm_fast", start(HIGH), torch.tensor(LOW), torch.tensor([HIGH]), 7)
    assert torch.equal(mine.result, record(ours, "dpm_fast", start(HIGH), LOW, HIGH, 7).result)


@pytest.mark.parametrize("options", ADAPTIVE, ids=str)
def test_dpm_adaptive(options):
    """Each try at the same sigmas, which follow from the errors of those before it."""
    assert_parity("dpm_adaptive", start(HIGH), LOW, HIGH, levels=1e-6, **options)


def test_dpm_adaptive_from_the_data_to_the_noise():
    assert_parity("dpm_adaptive", start(1.0), HIGH, LOW, levels=1e-6)


def test_dpm_adaptive_with_a_noise_sampler():
    assert_parity("dpm_adaptive", start(HIGH), LOW, HIGH, eta=0.5, noise_sampler=given_noise, levels=1e-6)


def test_dpm_adaptive_counts():
    (x, info), (their_x, their_info) = (
        record(
            module, "dpm_adaptive", start(HIGH), LOW, HIGH, rtol=0.01, atol=0.001, h_init=0.5, return_info=True
        ).result
        for module in (ours, load().sampling)
    )
    assert info == their_info
    assert info["n_reject"] > 0
    assert_near(x, their_x, 1e-5, "result")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dpm_adaptive_dtypes(dtype):
    """The model, the callback and the caller see theirs; in half precision the errors decide the steps less well."""
    mine, theirs = (record(module, "dpm_adaptive", start(HIGH, dtype), LOW, HIGH) for module in (ours, load().sampling))
    assert mine.result.dtype == theirs.result.dtype == dtype
    assert {x.dtype for x, _ in mine.calls} == {sigma.dtype for _, sigma in mine.calls} == {dtype}
    assert {info["denoised"].dtype for info in mine.told} == {info["x"].dtype for info in mine.told} == {dtype}
    exact = record(load().sampling, "dpm_adaptive", start(HIGH, dtype).double(), LOW, HIGH).result
    assert distance(mine.result, exact) <= max(1.01 * distance(theirs.result, exact), 1e-6)


def test_a_model_that_diverges_is_told_so():
    """Theirs would try ever new steps without an end."""
    with pytest.raises(InputError, match="not finite near sigma = 8"):
        ours.sample_dpm_adaptive(lambda x, sigma: x / 0.0, start(), LOW, HIGH, disable=True)


def test_log_likelihood():
    inner = network().float()

    def model(x, sigma, scale=1.0):
        level = sigma.view(-1, 1, 1, 1)
        return x / (1 + level**2) + scale * 0.1 * inner(x / (1 + level**2) ** 0.5)

    results = []
    for module in (ours, load().sampling):
        torch.manual_seed(3)
        found, info = module.log_likelihood(model, start(1.0), 0.05, 20.0, {"scale": 0.5}, atol=1e-3, rtol=1e-3)
        results.append((found, info, torch.get_rng_state()))
    (mine, info, generator), (theirs, their_info, their_generator) = results
    assert_near(mine, theirs, 1e-5, "log-likelihood")
    assert info == their_info
    assert torch.equal(generator, their_generator)


def test_log_likelihood_of_a_gaussian():
    """D = x / (1 + sigma^2) belongs to N(0, 1), whose log-likelihood is known; so is that of the noised data."""
    x, low = start(1.0), 0.1
    found, _ = ours.log_likelihood(lambda x, sigma: x / (1 + sigma.view(-1, 1, 1, 1) ** 2), x, low, 50.0, rtol=1e-6)
    expected = torch.distributions.Normal(0, (1 + low**2) ** 0.5).log_prob(x).flatten(1).sum(1)
    # Data of variance 1 leaves 1/2 (1/50)^2 a dimension at the noisy end.
    assert float((found - expected).abs().max()) < 192 * 0.5 / 50**2 * 4


def test_the_progress_bar_counts_calls(capsys):
    ours.sample_dpm_fast(denoiser, start(), LOW, HIGH, 5, disable=False)
    assert "5/5" in capsys.readouterr().err
