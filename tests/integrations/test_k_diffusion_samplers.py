"""The samplers that take sigmas, against k-diffusion's: float32, 1e-5 at every call of the model."""

from itertools import product

import pytest
import torch
from k_diffusion_drop_in import SHAPE, assert_parity, both, denoiser, distance, karras, record, start
from k_diffusion_peer import load

from fastdiff.integrations import k_diffusion
from fastdiff.integrations.k_diffusion import plans

CHURN = {"s_churn": 3.0, "s_tmin": 0.1, "s_tmax": 15.0, "s_noise": 1.1}
OPTIONS = {
    "euler": [{}, CHURN, {"s_churn": 40.0}],
    "heun": [{}, CHURN, {"s_churn": 40.0}],
    "dpm_2": [{}, CHURN, {"s_churn": 40.0}],
    "euler_ancestral": [{}, {"eta": 0.6, "s_noise": 1.1}, {"eta": 0.0}, {"eta": 1.2}],
    "dpm_2_ancestral": [{}, {"eta": 0.6, "s_noise": 1.1}, {"eta": 0.0}, {"eta": 1.2}],
    "lms": [{}, {"order": 1}, {"order": 2}, {"order": 3}, {"order": 5}],
    "dpmpp_2s_ancestral": [{}, {"eta": 0.6, "s_noise": 1.1}, {"eta": 0.0}, {"eta": 1.2}],
    "dpmpp_sde": [{}, {"eta": 0.6, "s_noise": 1.1}, {"eta": 0.0}, {"eta": 1.2}, {"r": 0.3}, {"r": 1.0}],
    "dpmpp_2m": [{}],
    "dpmpp_2m_sde": [{}, {"eta": 0.6, "s_noise": 1.1}, {"eta": 0.0}, {"eta": 1.2}, {"solver_type": "heun"}],
    "dpmpp_3m_sde": [{}, {"eta": 0.6, "s_noise": 1.1}, {"eta": 0.0}, {"eta": 1.2}],
}
CASES = [
    pytest.param(name, options, id=f"{name}-{options}") for name, several in OPTIONS.items() for options in several
]
GRIDS = {
    "to-data": karras(8),
    "to-noise": karras(8)[:-1],
    "two-steps": karras(2, low=0.5),
    "one-step": torch.tensor([20.0, 3.0]),
    "even": torch.linspace(20.0, 0.5, 9),
    "float64": karras(5).double(),
}
DRAWING = [name for name in OPTIONS if name not in ("lms", "dpmpp_2m", "euler", "heun", "dpm_2")]


def given_noise():
    """A noise sampler of a caller's own."""
    generator = torch.Generator().manual_seed(7)
    return lambda sigma, sigma_next: torch.randn(SHAPE, generator=generator)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_call(name, options, grid):
    assert_parity(name, start(), GRIDS[grid], **options)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde", "dpmpp_2s_ancestral"])
def test_many_steps(name):
    """Their levels' logarithms are rounded in the levels' dtype, which short steps add up."""
    options = {} if name == "dpmpp_2m" else {"noise_sampler": given_noise}
    assert_parity(name, start(14.6), karras(600, 0.03, 14.6), model=_plain, **options)


@pytest.mark.filterwarnings("ignore::scipy.integrate.IntegrationWarning")
@pytest.mark.parametrize(("steps", "order"), [*product([50, 200], [2, 4, 6]), (999, 4)])
def test_many_steps_of_lms(steps, order):
    """Its integrals are taken in float32, and where levels lie close its weights are large."""
    assert_parity("lms", start(14.6), karras(steps, 0.03, 14.6), model=_plain, order=order)


@pytest.mark.parametrize("sigmas", [[80.0, 0.0], [80.0, 40.0, 0.0], [80.0, 60.0, 40.0, 20.0, 0.02, 0.0]], ids=str)
def test_long_steps_of_lms(sigmas):
    assert_parity("lms", start(80.0), torch.tensor(sigmas), model=_plain)


@pytest.mark.parametrize("steps", [10, 20, 30])
def test_usual_runs_of_lms_are_rows(steps):
    levels = tuple(karras(steps, 0.03, 14.6).tolist())
    assert not plans.lms_multiplies_rounding(levels, torch.float32, 4)


@pytest.mark.parametrize("name", DRAWING)
def test_a_given_noise_sampler(name):
    assert_parity(name, start(), karras(6), noise_sampler=given_noise, eta=0.8)


@pytest.mark.parametrize("name", DRAWING)
def test_a_noise_sampler_is_told_the_levels(name):
    """Of the same step, in the same order, as the tensors that they are."""
    spans = {}
    for module in (k_diffusion.sampling, load().sampling):
        spans[module] = []

        def sampler(sigma, sigma_next, told=spans[module]):
            told.append((sigma, sigma_next))
            return torch.ones(SHAPE)

        record(module, name, start(), karras(5), noise_sampler=lambda sampler=sampler: sampler)
    ours, theirs = spans.values()
    assert len(ours) == len(theirs) > 0
    assert all(
        torch.equal(a, b) for our, their in zip(ours, theirs, strict=True) for a, b in zip(our, their, strict=True)
    )


@pytest.mark.parametrize("name", OPTIONS)
def test_one_step_to_the_data(name):
    sigmas = torch.tensor([20.0, 0.0])
    if name in ("dpmpp_2m_sde", "dpmpp_3m_sde"):
        # Theirs reads a variable that such a run never sets.
        with pytest.raises(UnboundLocalError):
            record(load().sampling, name, start(), sigmas)
        run = record(k_diffusion.sampling, name, start(), sigmas)
        assert torch.equal(run.result, denoiser(*run.calls[0]))
    else:
        assert_parity(name, start(), sigmas)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral"])
def test_repeated_levels(name):
    assert_parity(name, start(), torch.tensor([20.0, 8.0, 8.0, 8.0, 3.0, 1.0, 0.0]))


def test_repeated_levels_with_two_draws_a_step():
    """A Brownian path has no increment over no time, so that theirs needs a noise sampler of the caller's."""
    assert_parity("dpmpp_sde", start(), torch.tensor([20.0, 8.0, 8.0, 3.0, 1.0, 0.0]), noise_sampler=given_noise)


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("name", ["lms", "dpmpp_2m"])
def test_repeated_levels_in_a_multistep_method(name):
    """Theirs divides by the length of the step; ours starts anew after it."""
    sigmas = torch.tensor([20.0, 8.0, 8.0, 3.0, 1.0])
    ours, theirs = both(name, start(), sigmas)
    assert not theirs.result.isfinite().any()
    x = ours.calls[2][0]
    assert distance(x, ours.calls[1][0]) < 1e-6
    assert distance(ours.result, record(k_diffusion.sampling, name, x, sigmas[2:]).result) < 1e-6


@pytest.mark.parametrize("name", ["dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde"])
def test_a_step_that_rounding_takes_to_the_data(name):
    """Their s'^2 - u^2 is 0 in float32: a step of one call without noise, or of two that forget x."""
    sigmas = torch.tensor([4.0, 0.0005, 0.0])
    assert load().sampling.get_ancestral_step(*sigmas[:2])[0] == 0.0
    assert_parity(name, start(4.0), sigmas)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm_2", "lms", "dpmpp_2m"])
def test_from_the_data_to_the_noise(name):
    assert_parity(name, start(1.0), karras(6, low=0.5)[:-1].flip(0))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("shape", [(2, 3), (3, 2, 5), (1, 3, 2, 4, 4)], ids=str)
def test_any_rank(name, shape):
    assert_parity(name, start(shape=shape), karras(4), model=_plain)


def _plain(x, sigma, **_):
    level = sigma.view(-1, *[1] * (x.dim() - 1))
    return x / (1.0 + level**2) + 0.1 * torch.sin(x)


@pytest.mark.parametrize("name", OPTIONS)
def test_channels_last_draws_alike(name):
    """New noise is laid out as the state is, which decides which number goes where."""
    assert_parity(name, start().contiguous(memory_format=torch.channels_last), karras(5))


def test_no_step_is_no_change():
    x = start()
    for name in OPTIONS:
        assert record(k_diffusion.sampling, name, x, torch.tensor([20.0])).result is x


@pytest.mark.parametrize("name", OPTIONS)
def test_no_gradient_is_kept(name):
    run = record(k_diffusion.sampling, name, start().requires_grad_(), karras(3))
    assert not run.result.requires_grad


def test_extra_arguments_reach_the_model():
    seen = []

    def model(x, sigma, cond, scale):
        seen.append((cond, scale))
        return denoiser(x, sigma)

    extra = {"cond": "a", "scale": 2}
    k_diffusion.sample_heun(model, start(), karras(3), extra, None, True)
    assert seen == [("a", 2)] * 5


def test_bound_of_churn_on_a_level():
    """s_tmin and s_tmax are compared with the levels in the levels' own precision."""
    sigmas = torch.tensor([1.0, 0.3, 0.1, 0.0])
    mine = assert_parity("euler", start(1.0), sigmas, s_churn=1.0, s_tmin=0.1, s_tmax=0.3)
    assert [bool(info["sigma_hat"] > info["sigma"]) for info in mine.told] == [False, True, True]
