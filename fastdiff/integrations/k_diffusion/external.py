"""k_diffusion.external: networks that predict noise or v, as models of the data prediction D(x, sigma).

x = x_0 + sigma epsilon. A wrapper calls its network as inner_model(c_in x, t, **kwargs): c_in = 1/sqrt(sigma^2 + 1)
gives x the variance of the network's own inputs, t = sigma_to_t(sigma) is one number for each sample.
    forward(input, sigma, **kwargs)        D, input (N, ...) and sigma (N,)
    loss(input, noise, sigma, **kwargs)    (N,): the mean square error of the network's own prediction for
                                           input + sigma noise
    get_scalings(sigma)                    what forward multiplies with
Source: Karras et al. 2022, equation 7 and table 1; k-diffusion (Katherine Crowson).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError
from fastdiff.integrations.k_diffusion.sigmas import append_dims, append_zero

__all__ = [
    "CompVisDenoiser",
    "CompVisVDenoiser",
    "DiscreteEpsDDPMDenoiser",
    "DiscreteSchedule",
    "DiscreteVDDPMDenoiser",
    "OpenAIDenoiser",
    "VDenoiser",
]


def _scalings_like(denoiser, sigma: Tensor, like: Tensor) -> list[Tensor]:
    return [append_dims(scaling, like.dim()) for scaling in denoiser.get_scalings(sigma)]


def _mean_square(error: Tensor) -> Tensor:
    return error.pow(2).flatten(1).mean(1)


class _VScalings:
    """D = c_skip x + c_out v: c_skip = 1/(sigma^2 + 1), c_out = -sigma/sqrt(sigma^2 + 1), for data of variance 1."""

    sigma_data = 1.0
    get_v: Callable[..., Tensor]
    sigma_to_t: Callable[..., Tensor]

    def get_scalings(self, sigma):
        """(c_skip, c_out, c_in)."""
        total = sigma**2 + self.sigma_data**2
        return self.sigma_data**2 / total, -sigma * self.sigma_data / total**0.5, 1 / total**0.5

    def loss(self, input, noise, sigma, **kwargs):
        c_skip, c_out, c_in = _scalings_like(self, sigma, input)
        noised = input + noise * append_dims(sigma, input.dim())
        v = self.get_v(noised * c_in, self.sigma_to_t(sigma), **kwargs)
        return _mean_square(v - (input - c_skip * noised) / c_out)

    def forward(self, input, sigma, **kwargs):
        c_skip, c_out, c_in = _scalings_like(self, sigma, input)
        return self.get_v(input * c_in, self.sigma_to_t(sigma), **kwargs) * c_out + input * c_skip


class VDenoiser(_VScalings, nn.Module):
    """D of a network that predicts v, with the continuous time t = 2 atan(sigma) / pi, from 0 to 1."""

    def __init__(self, inner_model):
        super().__init__()
        self.inner_model = inner_model

    def get_v(self, *args, **kwargs):
        return self.inner_model(*args, **kwargs)

    def sigma_to_t(self, sigma):
        return sigma.atan() / math.pi * 2

    def t_to_sigma(self, t):
        """tan(pi t / 2)."""
        return (t * math.pi / 2).tan()


class DiscreteSchedule(nn.Module):
    """Training timesteps t = 0, 1 ... with these sigmas, which rise; between them log sigma is linear in t.

    quantize   whether `sigma_to_t` gives the nearest whole timestep instead
    """

    sigmas: Tensor
    log_sigmas: Tensor

    def __init__(self, sigmas, quantize):
        super().__init__()
        if not isinstance(sigmas, Tensor) or sigmas.dim() != 1 or len(sigmas) < 2:
            got = tuple(sigmas.shape) if isinstance(sigmas, Tensor) else type(sigmas).__name__
            raise InputError(f"sigmas: expected a tensor of two timesteps or more, (T,), got {got}")
        self.register_buffer("sigmas", sigmas)
        self.register_buffer("log_sigmas", sigmas.log())
        self.quantize = quantize

    @property
    def sigma_min(self):
        return self.sigmas[0]

    @property
    def sigma_max(self):
        return self.sigmas[-1]

    def get_sigmas(self, n=None):
        """The levels of n timesteps even from the last to the first, by default of all, and 0."""
        if n is None:
            return append_zero(self.sigmas.flip(0))
        return append_zero(self.t_to_sigma(torch.linspace(len(self.sigmas) - 1, 0, n, device=self.sigmas.device)))

    def sigma_to_t(self, sigma, quantize=None):
        """The timestep of a level, the nearest end for one beyond them; of sigma's shape."""
        log_sigma = sigma.log()
        distances = log_sigma - self.log_sigmas[:, None]
        if self.quantize if quantize is None else quantize:
            return distances.abs().argmin(dim=0).view(sigma.shape)
        below = (distances.ge(0).sum(dim=0) - 1).clamp(0, len(self.log_sigmas) - 2)
        low, high = self.log_sigmas[below], self.log_sigmas[below + 1]
        w = ((low - log_sigma) / (low - high)).clamp(0, 1)
        return ((1 - w) * below + w * (below + 1)).view(sigma.shape)

    def t_to_sigma(self, t):
        """The level of a timestep, whole or between two."""
        t = t.float()
        w = t.frac()
        low, high = self.log_sigmas[t.floor().long()], self.log_sigmas[t.ceil().long()]
        return ((1 - w) * low + w * high).exp()


def _sigmas_of(alphas_cumprod: Tensor) -> Tensor:
    """sigma / alpha of a schedule that keeps the variance."""
    return ((1 - alphas_cumprod) / alphas_cumprod) ** 0.5


class DiscreteEpsDDPMDenoiser(DiscreteSchedule):
    """D = x - sigma epsilon of a network that predicts epsilon, trained with `alphas_cumprod` (T,)."""

    def __init__(self, model, alphas_cumprod, quantize):
        super().__init__(_sigmas_of(alphas_cumprod), quantize)
        self.inner_model = model
        self.sigma_data = 1.0

    def get_scalings(self, sigma):
        """(c_out, c_in)."""
        return -sigma, 1 / (sigma**2 + self.sigma_data**2) ** 0.5

    def get_eps(self, *args, **kwargs):
        return self.inner_model(*args, **kwargs)

    def loss(self, input, noise, sigma, **kwargs):
        _, c_in = _scalings_like(self, sigma, input)
        noised = input + noise * append_dims(sigma, input.dim())
        return _mean_square(self.get_eps(noised * c_in, self.sigma_to_t(sigma), **kwargs) - noise)

    def forward(self, input, sigma, **kwargs):
        c_out, c_in = _scalings_like(self, sigma, input)
        return input + self.get_eps(input * c_in, self.sigma_to_t(sigma), **kwargs) * c_out


class OpenAIDenoiser(DiscreteEpsDDPMDenoiser):
    """D of a network of OpenAI's guided-diffusion, whose `diffusion` has alphas_cumprod.

    has_learned_sigmas   whether the second half of its channels is the variance, which D has no use for
    """

    def __init__(self, model, diffusion, quantize=False, has_learned_sigmas=True, device="cpu"):
        alphas_cumprod = torch.tensor(diffusion.alphas_cumprod, device=device, dtype=torch.float32)
        super().__init__(model, alphas_cumprod, quantize=quantize)
        self.has_learned_sigmas = has_learned_sigmas

    def get_eps(self, *args, **kwargs):
        output = self.inner_model(*args, **kwargs)
        return output.chunk(2, dim=1)[0] if self.has_learned_sigmas else output


class CompVisDenoiser(DiscreteEpsDDPMDenoiser):
    """D of a latent diffusion model of CompVis, which has alphas_cumprod and apply_model(x, t, cond), for epsilon."""

    def __init__(self, model, quantize=False, device="cpu"):
        super().__init__(model, model.alphas_cumprod, quantize=quantize)

    def get_eps(self, *args, **kwargs):
        return self.inner_model.apply_model(*args, **kwargs)


class DiscreteVDDPMDenoiser(_VScalings, DiscreteSchedule):
    """D of a network that predicts v, trained with `alphas_cumprod` (T,)."""

    def __init__(self, model, alphas_cumprod, quantize):
        super().__init__(_sigmas_of(alphas_cumprod), quantize)
        self.inner_model = model

    def get_v(self, *args, **kwargs):
        return self.inner_model(*args, **kwargs)


class CompVisVDenoiser(DiscreteVDDPMDenoiser):
    """`CompVisDenoiser` for a model that predicts v."""

    def __init__(self, model, quantize=False, device="cpu"):
        super().__init__(model, model.alphas_cumprod, quantize=quantize)

    def get_v(self, x, t, cond, **kwargs):
        return self.inner_model.apply_model(x, t, cond)
