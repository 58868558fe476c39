"""What ComfyUI's samplers ask a model and their arguments: the kind of its noise levels, and where noise comes from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.integrations.k_diffusion.noise import default_noise_sampler

NoiseSampler = Callable[[Tensor, Tensor], Tensor]
# What ComfyUI hands on with every call of a sampler, and nothing else does.
ARGUMENTS = {"model_options", "seed", "denoise_mask"}
# How far below 100 % of the noise a flow begins where lambda has to be finite.
FIRST_PERCENT = 1e-4


def conventions(model: Any, extra_args: dict[str, Any] | None) -> bool:
    """Whether ComfyUI calls: by its own keywords for the model, or by a model of its own."""
    patched = hasattr(getattr(model, "inner_model", None), "model_patcher")
    return patched or not ARGUMENTS.isdisjoint(extra_args or {})


def sampling_of(model: Any) -> Any:
    """The model's `model_sampling`, which knows its noise levels; None where it has none."""
    inner = getattr(model, "inner_model", None)
    patcher = getattr(inner, "model_patcher", None)
    if patcher is not None:
        return patcher.get_model_object("model_sampling")
    return getattr(getattr(inner, "inner_model", None), "model_sampling", None)


def is_flow(sampling: Any) -> bool:
    """Whether states are (1 - sigma) x_0 + sigma epsilon, and not x_0 + sigma epsilon: ComfyUI's class CONST."""
    return any(base.__name__ == "CONST" for base in type(sampling).__mro__)


def noise_scale(sampling: Any) -> float:
    """What the model has all fresh noise multiplied by."""
    return float(getattr(sampling, "noise_scale", 1.0))


def noise_source(x: Tensor, extra_args: dict[str, Any] | None) -> NoiseSampler:
    """(sigma, sigma_next) -> standard normal noise like x: from a generator of the seed in extra_args, on the CPU of
    the seed plus 1, so that it is not the starting noise again; without a seed from PyTorch's own."""
    seed = (extra_args or {}).get("seed")
    if seed is None:
        return default_noise_sampler(x)
    generator = torch.Generator(device=x.device)
    generator.manual_seed(seed + 1 if x.device.type == "cpu" else seed)

    def noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        return ops.torch_normal(x.shape, generator=generator, device=x.device, dtype=x.dtype)

    return noise


def below_pure_noise(sigmas: Tensor, sampling: Any) -> Tensor:
    """The same levels, of a flow the first of which is moved below 1, where log(alpha/sigma) is finite."""
    if len(sigmas) < 2 or not is_flow(sampling) or float(sigmas[0]) < 1.0:
        return sigmas
    moved = sigmas.clone()
    moved[0] = sampling.percent_to_sigma(FIRST_PERCENT)
    return moved


class Unguided:
    """The data prediction without the condition, which guidance leaves behind at each call of the model."""

    def __init__(self, extra_args: dict[str, Any] | None) -> None:
        self._latest: Tensor | None = None
        options = dict((extra_args or {}).get("model_options") or {})
        options["sampler_post_cfg_function"] = [*options.get("sampler_post_cfg_function", []), self._remember]
        options["disable_cfg1_optimization"] = True
        self.extra_args = {**(extra_args or {}), "model_options": options}

    def _remember(self, args: dict[str, Any]) -> Any:
        self._latest = args["uncond_denoised"]
        return args["denoised"]

    def __call__(self, row: int) -> Tensor | None:
        """That of the last call."""
        return self._latest
