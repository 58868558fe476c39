"""A model as ComfyUI hands it to a sampler, its two kinds of noise levels, and a run of one of our samplers."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.integrations import k_diffusion

SHAPE = (2, 3, 5, 4)
# What ComfyUI lists.
NAMES = [
    "euler",
    "euler_cfg_pp",
    "euler_ancestral",
    "euler_ancestral_cfg_pp",
    "heun",
    "heunpp2",
    "exp_heun_2_x0",
    "exp_heun_2_x0_sde",
    "dpm_2",
    "dpm_2_ancestral",
    "lms",
    "dpm_fast",
    "dpm_adaptive",
    "dpmpp_2s_ancestral",
    "dpmpp_2s_ancestral_cfg_pp",
    "dpmpp_sde",
    "dpmpp_sde_gpu",
    "dpmpp_2m",
    "dpmpp_2m_cfg_pp",
    "dpmpp_2m_sde",
    "dpmpp_2m_sde_gpu",
    "dpmpp_2m_sde_heun",
    "dpmpp_2m_sde_heun_gpu",
    "dpmpp_3m_sde",
    "dpmpp_3m_sde_gpu",
    "ddpm",
    "lcm",
    "ipndm",
    "ipndm_v",
    "deis",
    "res_multistep",
    "res_multistep_cfg_pp",
    "res_multistep_ancestral",
    "res_multistep_ancestral_cfg_pp",
    "gradient_estimation",
    "gradient_estimation_cfg_pp",
    "er_sde",
    "seeds_2",
    "seeds_3",
    "sa_solver",
    "sa_solver_pece",
    "ddim",
    "uni_pc",
    "uni_pc_bh2",
]
# Those that take levels; the others take the two ends.
STEPPED = [name for name in NAMES if name not in ("dpm_fast", "dpm_adaptive")]


class EPS:
    """States x_0 + s epsilon."""

    low, high = 0.03, 14.6
    sigmas = torch.linspace(low, high, 1000)
    sigma_min, sigma_max = sigmas[0], sigmas[-1]

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        return latent_image + sigma * noise

    def percent_to_sigma(self, percent: float) -> float:
        return self.high * (self.low / self.high) ** percent

    def timestep(self, sigma: Tensor) -> Tensor:
        return (sigma - self.low) / (self.high - self.low) * 999.0

    def sigma(self, timestep: Tensor) -> Tensor:
        return self.low + timestep / 999.0 * (self.high - self.low)


class CONST:
    """States (1 - s) x_0 + s epsilon."""

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False) -> Tensor:
        return (1.0 - sigma) * latent_image + sigma * noise


class Flow(CONST):
    sigmas = torch.linspace(0.001, 1.0, 1000)
    sigma_min, sigma_max = sigmas[0], sigmas[-1]

    def percent_to_sigma(self, percent: float) -> float:
        return 1.0 - percent

    def timestep(self, sigma: Tensor) -> Tensor:
        return 1000.0 * sigma

    def sigma(self, timestep: Tensor) -> Tensor:
        return timestep / 1000.0


def predict(x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Bounded, wavy data predictions in float64: with the condition, and without."""
    wide, s = x.double(), sigma.double().reshape(-1, *[1] * (x.dim() - 1))
    scaled = wide / (1.0 + s**2) ** 0.5
    return torch.tanh(scaled + 0.3 * torch.sin(3.0 * wide / (1.0 + s))), torch.tanh(0.8 * scaled - 0.2 * s)


class Model:
    """model(x, sigma, **extra_args), with the attributes by which a sampler finds the kind of levels."""

    def __init__(self, sampling: Any) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.given: list[dict[str, Any]] = []
        self.inner_model = self
        self.model_patcher, self.model_sampling = self, sampling

    def get_model_object(self, name: str) -> Any:
        assert name == "model_sampling"
        return self.model_sampling

    def __call__(self, x: Tensor, sigma: Tensor, **arguments: Any) -> Tensor:
        self.calls.append((x.clone(), sigma.clone()))
        self.given.append(arguments)
        denoised, unguided = (value.to(x.dtype) for value in predict(x, sigma))
        for function in (arguments.get("model_options") or {}).get("sampler_post_cfg_function", []):
            denoised = function({"denoised": denoised, "uncond_denoised": unguided, "sigma": sigma})
        return denoised


class Found(NamedTuple):
    result: Tensor
    model: Model
    told: list[dict[str, Any]]


def levels_of(kind: str, steps: int, last: float = 0.0) -> Tensor:
    """Levels that fall geometrically, and `last`; of a flow from 1."""
    high, low = (1.0, 0.05) if kind == "flow" else (14.6, 0.03)
    return torch.cat([torch.logspace(0.0, 1.0, steps, base=low / high) * high, torch.tensor([last])])


def sampling_of(kind: str) -> Any:
    return Flow() if kind == "flow" else EPS()


def start_of(kind: str) -> Tensor:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    return x if kind == "flow" else 14.6 * x


def noises() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(5)
    while True:
        yield torch.randn(SHAPE, generator=generator)


def ours(name: str, kind: str, sigmas: Tensor, **options: Any) -> Found:
    """`noise=True` among the options hands the noise of `noises` in."""
    model, told, drawn = Model(sampling_of(kind)), [], noises()
    if options.pop("noise", False):
        options["noise_sampler"] = lambda sigma, sigma_next: next(drawn)
    function = getattr(k_diffusion, f"sample_{name}")
    extra_args = {"model_options": {}, "seed": 3, "denoise_mask": None}
    result = function(
        model, start_of(kind), sigmas, extra_args=extra_args, callback=told.append, disable=True, **options
    )
    return Found(result, model, told)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float32
    error = float((found.double() - expected).norm() / expected.norm())
    assert error < 1e-5, f"relative error {error:.1e}"
