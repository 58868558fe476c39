"""k-diffusion's DPM-Solver with steps whose length the error controls, and its likelihood by an adaptive solver.

`sampling` says what the arguments of a sampler have in common.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff.engine.dpm_adaptive import Controller, pair, scaled_error
from fastdiff.errors import InputError
from fastdiff.integrations.k_diffusion import plans
from fastdiff.integrations.k_diffusion.loop import Callback, Model, check_output, check_state, read_ends
from fastdiff.integrations.k_diffusion.noise import NoiseSampler, noise_or_default
from fastdiff.integrations.k_diffusion.sigmas import append_dims, get_ancestral_step
from fastdiff.ops import reference

_CLOSE = 1e-5
"""In log sigma: how near the end counts as there."""


@torch.no_grad()
def sample_dpm_adaptive(
    model,
    x,
    sigma_min,
    sigma_max,
    extra_args=None,
    callback=None,
    disable=None,
    order=3,
    rtol=0.05,
    atol=0.0078,
    h_init=0.05,
    pcoeff=0.0,
    icoeff=1.0,
    dcoeff=0.0,
    accept_safety=0.81,
    eta=0.0,
    s_noise=1.0,
    noise_sampler=None,
    return_info=False,
):
    """DPM-Solver of two orders, whose difference is the error that a step's length h in log sigma is controlled by.

    The batch has one h. A step goes down to `get_ancestral_step`'s level, but not below sigma_min, and adds noise; it
    is drawn with every step that counts, whether eta adds it or not.
    order           of the better solution, 2 or 3
    rtol, atol      the error allowed is max(atol, rtol |x|), in the root mean square
    h_init          the first h
    pcoeff, icoeff, dcoeff, accept_safety   of `fastdiff.engine.dpm_adaptive.Controller`
    return_info     gives (x, info) with the counts 'steps', 'nfe' (`order` a step), 'n_accept' and 'n_reject'
    callback        told after each try also 't' and 't_up' = -log sigma, 'error', 'h' and the counts
    Source: Lu et al. 2022, "DPM-Solver", section 3.4; k-diffusion (Katherine Crowson).
    """
    check_state(x)
    first, last = read_ends(sigma_min, sigma_max, eta)
    eta, s_noise = plans.noise_options(eta, s_noise)
    if order not in (2, 3):
        raise InputError(f"order: expected 2 or 3, got {order!r}")
    gains = {"p": pcoeff, "i": icoeff, "d": dcoeff, "safety": accept_safety}
    h = abs(h_init) * (1.0 if last > first else -1.0)
    # Noise in the steps lowers the order of the error.
    control = Controller(np.array([h]), 1.5 if eta else float(order), **gains)
    with tqdm(disable=disable) as bar:
        noise = noise_or_default(noise_sampler, x)
        run = _Adaptive(model, extra_args or {}, bar, callback, order, eta, s_noise, noise, x.dtype)
        result, info = run.solve(x, first, last, control, rtol, atol)
    return (result, info) if return_info else result


@dataclass
class _Adaptive:
    model: Model
    extra_args: dict[str, Any]
    bar: Any
    callback: Callback | None
    order: int
    eta: float
    s_noise: float
    noise: NoiseSampler
    dtype: torch.dtype

    def solve(
        self, x: Tensor, first: Tensor, last: Tensor, control: Controller, rtol: float, atol: float
    ) -> tuple[Tensor, dict[str, int]]:
        """Arithmetic in float32 or better; the model, the callback and the caller see the state's own dtype."""
        info = {"steps": 0, "nfe": 0, "n_accept": 0, "n_reject": 0}
        upward = last < first
        s, end, previous = first, last.item(), x
        while s > end + _CLOSE if upward else s < end - _CLOSE:
            t = torch.maximum(last, s + control.h.item()) if upward else torch.minimum(last, s + control.h.item())
            down, up = self._split(s, t, last)
            eps = self._epsilon(x, s.neg().exp())
            denoised = (x - eps * s.neg().exp()).to(x.dtype)
            low, high = pair(self.order, self._epsilon, x, eps, s, down)
            error = scaled_error(low, high, previous, rtol, atol, 1)[0]
            size = np.array([error.item()])
            if not np.isfinite(size).all():
                raise InputError(f"model: gave numbers that are not finite near sigma = {math.exp(-s.item()):g}")
            accepted = bool(control.accept(size, np.array([True])).item())
            if accepted:
                noise = self.noise(s.neg().exp(), t.neg().exp())
                self.dtype = torch.promote_types(self.dtype, noise.dtype)
                previous, x, s = low, (high + up * self.s_noise * noise).to(self.dtype), t
            info["n_accept" if accepted else "n_reject"] += 1
            info["nfe"] += self.order
            info["steps"] += 1
            if self.callback is not None:
                sigma = s.neg().exp()
                tried = {"i": info["steps"] - 1, "t": s, "t_up": s, "error": error}
                levels = {"sigma": sigma, "sigma_hat": sigma, "h": control.h.item()}
                self.callback({**levels, "x": x, "denoised": denoised, **tried, **info})
        return x, info

    def _split(self, start: Tensor, to: Tensor, last: Tensor) -> tuple[Tensor, Tensor | float]:
        """(-log sigma to step to without noise, standard deviation of the noise that leads back to `to`)."""
        if not self.eta:
            return to, 0.0
        sigma = to.neg().exp()
        down = torch.minimum(last, -get_ancestral_step(start.neg().exp(), sigma, self.eta)[0].log())
        return down, (sigma**2 - down.neg().exp() ** 2) ** 0.5

    def _epsilon(self, x: Tensor, sigma: Tensor) -> Tensor:
        """(x - D) / sigma."""
        given = x.to(self.dtype)
        denoised = self.model(given, sigma * given.new_ones([given.shape[0]]), **self.extra_args)
        check_output(denoised, given)
        self.bar.update()
        return (reference.wide(x) - denoised) / sigma


@torch.no_grad()
def log_likelihood(model, x, sigma_min, sigma_max, extra_args=None, atol=1e-4, rtol=1e-4):
    """(log p(x) of each sample, {'fevals': calls of the model}), of data noised to sigma_min.

    log p = log N(x(sigma_max); 0, sigma_max^2) + integral of div(d) dsigma over the flow dx/dsigma = d = (x - D)/sigma,
    whose divergence is estimated as v^T (grad d) v with one v of random signs, drawn like x.
    Source: Song et al. 2021, "Score-Based Generative Modeling through SDEs", appendix D.2; Hutchinson 1990.
    Errors: InputError without torchdiffeq.
    """
    check_state(x)
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise InputError("log_likelihood: needs torchdiffeq; pip install 'fastdiff-engine[adaptive]'") from error
    arguments = {} if extra_args is None else extra_args
    ones, signs = x.new_ones([x.shape[0]]), torch.randint_like(x, 2) * 2 - 1
    calls = 0

    def flow(sigma: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        with torch.enable_grad():
            at = state[0].detach().requires_grad_()
            denoised = model(at, sigma * ones, **arguments)
            check_output(denoised, at)
            d = (at - denoised) / append_dims(sigma, at.dim())
            (pulled,) = torch.autograd.grad((d * signs).sum(), at)
        return d.detach(), (signs * pulled).flatten(1).sum(1)

    ends = x.new_tensor([sigma_min, sigma_max])
    path, change = odeint(flow, (x, x.new_zeros([x.shape[0]])), ends, atol=atol, rtol=rtol, method="dopri5")
    prior = torch.distributions.Normal(0, sigma_max).log_prob(path[-1]).flatten(1).sum(1)
    return prior + change[-1], {"fevals": calls}
