"""Half precision, float64 and mixed dtypes: k-diffusion's dtype everywhere, and never farther from the truth."""

import pytest
import torch
from k_diffusion_drop_in import SHAPE, both, denoiser, distance, karras, record, start
from k_diffusion_peer import load

from fastdiff.integrations.k_diffusion import sampling as ours

HALF = [torch.float16, torch.bfloat16]
TAKING_SIGMAS = [
    "euler",
    "heun",
    "dpm_2",
    "lms",
    "dpmpp_2m",
    "euler_ancestral",
    "dpm_2_ancestral",
    "dpmpp_2s_ancestral",
    "dpmpp_sde",
    "dpmpp_2m_sde",
    "dpmpp_3m_sde",
]
NOISY = TAKING_SIGMAS[5:]


def run(module, name, half, dtype):
    """In `dtype`; float64 is the truth, of the same start, data predictions and noises, all rounded to `half`.

    The predictions do not depend on the state.
    """
    generator = torch.Generator().manual_seed(1)

    def draw(*_):
        return torch.randn(SHAPE, generator=generator).to(half).to(dtype)

    x, sigmas = start(20.0, half).to(dtype), karras(6, low=0.3)
    levels = (0.3, 20.0, 10) if name == "dpm_fast" else (sigmas.double() if dtype == torch.float64 else sigmas,)
    options = {"noise_sampler": lambda: draw} if name in (*NOISY, "dpm_fast") else {}
    return record(module, name, x, *levels, model=draw, **options)


@pytest.mark.parametrize("name", [*TAKING_SIGMAS, "dpm_fast"])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_half_is_as_near_to_the_truth(name, dtype):
    """Every state, where the model's output is the same for all."""
    truth = run(load().sampling, name, dtype, torch.float64)
    theirs, mine = (run(module, name, dtype, dtype) for module in (load().sampling, ours))
    assert len(mine.calls) == len(theirs.calls) == len(truth.calls)
    states = [[*(x for x, _ in one.calls), one.result] for one in (truth, theirs, mine)]
    for index, (exact, their, our) in enumerate(zip(*states, strict=True)):
        assert our.dtype == their.dtype
        ours_error, their_error = distance(our, exact), distance(their, exact)
        assert ours_error <= 1.01 * their_error + 2.0**-23, f"state {index}: {ours_error:.1e} > {their_error:.1e}"


@pytest.mark.parametrize("name", TAKING_SIGMAS)
@pytest.mark.parametrize("sigmas", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("x", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("output", [torch.float16, torch.float32], ids=str)
def test_dtypes_are_theirs(name, sigmas, x, output):
    """Of every state, sigma and draw, whatever the dtypes of x, sigmas and the model's output."""

    def model(state, sigma):
        return denoiser(state, sigma).to(output)

    mine, theirs = both(name, start(20.0, x), karras(4).to(sigmas), model=model)
    for (our_x, our_sigma), (their_x, their_sigma) in zip(mine.calls, theirs.calls, strict=True):
        assert our_x.dtype == their_x.dtype
        assert our_sigma.dtype == their_sigma.dtype
    assert mine.result.dtype == theirs.result.dtype
    assert torch.equal(mine.generator, theirs.generator)
    assert distance(mine.result, theirs.result) < (0.01 if torch.float16 in (x, output) else 1e-5)


@pytest.mark.parametrize("name", TAKING_SIGMAS)
def test_float64_keeps_its_digits(name):
    mine, theirs = both(name, start(20.0, torch.float64), karras(8).double())
    for (our_x, _), (their_x, _) in zip(mine.calls, theirs.calls, strict=True):
        assert distance(our_x, their_x) < 1e-9
    assert distance(mine.result, theirs.result) < 1e-9


@pytest.mark.parametrize("name", NOISY)
@pytest.mark.parametrize("noise", [torch.float32, torch.float64], ids=str)
def test_wider_noise_widens_the_state(name, noise):
    def sampler():
        generator = torch.Generator().manual_seed(4)
        return lambda sigma, sigma_next: torch.randn(SHAPE, generator=generator).to(noise)

    mine, theirs = both(name, start(20.0, torch.float16), karras(4), noise_sampler=sampler)
    assert [x.dtype for x, _ in mine.calls] == [x.dtype for x, _ in theirs.calls]
    assert mine.calls[-1][0].dtype == noise
    assert mine.result.dtype == theirs.result.dtype
