"""What ComfyUI's callbacks and models are told, where noise comes from, and what is refused."""

import inspect

import pytest
import torch
from comfyui_peer import EPS, SHAPE, STEPPED, Flow, Model, levels_of, noises, ours, sampling_of, start_of
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.errors import InputError
from fastdiff.integrations import k_diffusion

SEEDED = ("euler_ancestral", "ddpm", "lcm", "res_multistep", "seeds_2", "er_sde", "euler_ancestral_cfg_pp", "sa_solver")
BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde_gpu")


@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("name", STEPPED)
def test_what_the_callback_and_the_model_are_told(name, kind):
    sigmas = levels_of(kind, 4)
    found = ours(name, kind, sigmas)
    assert found.result.shape == SHAPE
    assert torch.isfinite(found.result).all()
    keys = {"x", "i", "denoised"} | (set() if name.startswith("uni_pc") else {"sigma", "sigma_hat"})
    assert [told["i"] for told in found.told] == [0, 1, 2, 3]
    assert all(set(told) == keys for told in found.told)
    assert all(told["denoised"].shape == told["x"].shape == SHAPE for told in found.told)
    for arguments in found.model.given:
        assert arguments["seed"] == 3
        assert arguments["denoise_mask"] is None
        assert ("sampler_post_cfg_function" in arguments["model_options"]) == name.endswith("cfg_pp")
    assert found.model.calls[0][1].shape == SHAPE[:1]


@pytest.mark.parametrize("name", ["ipndm", "ipndm_v", "deis"])
def test_these_tell_the_first_state(name):
    assert all(torch.equal(told["x"], start_of("eps")) for told in ours(name, "eps", levels_of("eps", 4)).told)


@pytest.mark.parametrize("name", SEEDED)
def test_noise_is_of_the_seed_plus_one(name):
    sigmas, drawn = levels_of("eps", 4), []
    generator = torch.Generator().manual_seed(4)

    def noise(sigma, sigma_next):
        drawn.append((float(sigma), float(sigma_next)))
        return torch.randn(SHAPE, generator=generator)

    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = ours(name, "eps", sigmas)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found.result, ours(name, "eps", sigmas, noise_sampler=noise).result)
    assert drawn
    assert all(low < high for high, low in drawn)


@pytest.mark.parametrize("name", ["euler_ancestral", "seeds_2"])
def test_without_a_seed_noise_is_of_pytorchs_generator(name):
    function, sigmas = getattr(k_diffusion, f"sample_{name}"), levels_of("eps", 3)
    torch.manual_seed(1)
    found = function(Model(EPS()), start_of("eps"), sigmas, disable=True)
    torch.manual_seed(1)
    options = {"noise_sampler": lambda sigma, sigma_next: torch.randn(SHAPE), "disable": True}
    assert torch.equal(found, function(Model(EPS()), start_of("eps"), sigmas, **options))


@pytest.mark.parametrize("name", BROWNIAN)
def test_a_brownian_path_is_of_the_seed(name):
    sigmas = levels_of("flow", 4)
    first, again = ours(name, "flow", sigmas), ours(name, "flow", sigmas)
    assert torch.equal(first.result, again.result)
    other = getattr(k_diffusion, f"sample_{name}")(
        Model(Flow()), start_of("flow"), sigmas, extra_args={"seed": 4}, disable=True
    )
    assert not torch.allclose(first.result, other)


@pytest.mark.parametrize(("name", "draws"), [("euler", 1), ("heun", 1), ("dpm_2", 1), ("heunpp2", 4)])
def test_churn_draws_where_it_adds_or_always(name, draws):
    """The levels from 9 down are churned: all but the first, and of these the second alone where s_tmin is 1."""
    sigmas = torch.tensor([14.6, 5.0, 0.9, 0.1, 0.0])
    torch.manual_seed(1)
    ours(name, "eps", sigmas, s_churn=2.0, s_tmin=1.0, s_tmax=9.0)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    for _ in range(draws):
        torch.randn(SHAPE)
    assert torch.equal(torch.get_rng_state(), after)


def test_k_diffusion_s_caller_gets_k_diffusion():
    """Whose last step of lms integrates to 0, and whose ancestral noise has no seed."""
    sigmas = levels_of("eps", 4)

    def model(x, sigma):
        return Model(EPS())(x, sigma)

    given = (model, start_of("eps"), sigmas)
    theirs = k_diffusion.sampling.sample_lms(*given, disable=True)
    assert torch.equal(k_diffusion.sample_lms(*given, disable=True), theirs)
    assert not torch.allclose(ours("lms", "eps", sigmas).result, theirs)
    torch.manual_seed(1)
    found = k_diffusion.sample_euler_ancestral(*given, disable=True)
    torch.manual_seed(1)
    assert torch.equal(found, k_diffusion.sampling.sample_euler_ancestral(*given, disable=True))


def test_the_callers_options_and_sigmas_stay_as_they_are():
    options, sigmas = {"sampler_post_cfg_function": [lambda args: args["denoised"] * 0.5]}, levels_of("flow", 3)
    extra_args, model = {"model_options": options, "seed": 1}, Model(Flow())
    kept = sigmas.clone()
    for name in ("euler_cfg_pp", "uni_pc", "er_sde"):
        getattr(k_diffusion, f"sample_{name}")(model, start_of("flow"), sigmas, extra_args=extra_args, disable=True)
    assert extra_args == {"model_options": options, "seed": 1}
    assert len(options["sampler_post_cfg_function"]) == 1
    assert torch.equal(sigmas, kept)


@pytest.mark.parametrize("scale", [0.5, 1.0])
@pytest.mark.parametrize("name", ["euler_ancestral", "er_sde", "seeds_3", "dpmpp_2m_sde", "sa_solver"])
def test_a_model_scales_fresh_noise(name, scale):
    sampling, sigmas = Flow(), levels_of("flow", 4)
    sampling.noise_scale = scale
    function, options = getattr(k_diffusion, f"sample_{name}"), {"extra_args": {"seed": 3}, "disable": True}

    def noise(factor):
        generator = torch.Generator().manual_seed(4)
        return lambda sigma, sigma_next: factor * torch.randn(SHAPE, generator=generator)

    found = function(Model(sampling), start_of("flow"), sigmas, noise_sampler=noise(1.0), **options)
    expected = function(Model(Flow()), start_of("flow"), sigmas, noise_sampler=noise(scale), **options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class Reads(TorchDispatchMode):
    """Counts how often a number of a tensor is read on the host."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["eps", "flow"])
@pytest.mark.parametrize("name", STEPPED)
def test_nothing_is_read_between_the_first_call_and_the_last(name, kind):
    counts, reads, drawn = [], Reads(), noises()
    options = {"extra_args": {"seed": 3}, "callback": lambda told: counts.append(reads.count), "disable": True}
    function = getattr(k_diffusion, f"sample_{name}")
    if "noise_sampler" in inspect.signature(function).parameters:
        options["noise_sampler"] = lambda sigma, sigma_next: next(drawn)
    with reads:
        function(Model(sampling_of(kind)), start_of(kind), levels_of(kind, 4), **options)
    assert len(counts) == 4
    assert counts[0] == counts[-1] == reads.count


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("seeds_2", {"solver_type": "heun"}, "solver_type: expected one of phi_1, phi_2"),
        ("deis", {"deis_mode": "logrho"}, "deis_mode: expected one of tab, rhoab"),
        ("dpmpp_2m_sde", {"solver_type": "phi_1"}, "solver_type: expected one of midpoint, heun"),
        ("sa_solver", {"predictor_order": 5}, "predictor_order: expected a whole number from 1 to 4"),
        ("ipndm", {"max_order": 5}, "order: expected a whole number from 1 to 4"),
    ],
)
def test_bad_options(name, options, message):
    with pytest.raises(InputError, match=message):
        ours(name, "eps", levels_of("eps", 3), **options)


def test_sa_solver_needs_to_know_the_models_levels():
    with pytest.raises(InputError, match="percent_to_sigma"):
        k_diffusion.sample_sa_solver(lambda x, sigma: x, start_of("eps"), levels_of("eps", 3), disable=True)


def test_no_step_is_no_change():
    for name in STEPPED:
        x = start_of("eps")
        assert getattr(k_diffusion, f"sample_{name}")(Model(EPS()), x, torch.tensor([3.0]), disable=True) is x
