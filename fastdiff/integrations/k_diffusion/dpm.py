"""k-diffusion's DPM-Solver++ samplers, deterministic and with noise, and DPM-Solver-fast.

`sampling` says what their arguments have in common. h and h0 are this and the last step in -log sigma.
"""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm

from fastdiff.integrations.k_diffusion import plans
from fastdiff.integrations.k_diffusion.loop import Draw, Plan, begin, check_state, read_ends, run, steps_of
from fastdiff.integrations.k_diffusion.noise import NoiseSampler, at_the_end, brownian, noise_or_default
from fastdiff.samplers.exponential import SOLVERS
from fastdiff.samplers.table import choice


@torch.no_grad()
def sample_dpm_fast(
    model,
    x,
    sigma_min,
    sigma_max,
    n,
    extra_args=None,
    callback=None,
    disable=None,
    eta=0.0,
    s_noise=1.0,
    noise_sampler=None,
):
    """DPM-Solver of order 3, 2 and 1 in n calls of the model, by steps even in log sigma from sigma_max to sigma_min.

    Each step goes down to `get_ancestral_step`'s level, but not below sigma_min, and adds noise; it is drawn at every
    step, whether eta adds it or not. The callback is also told t = -log sigma as 't' and 't_up'.
    Source: Lu et al. 2022, "DPM-Solver", section 3.4.
    """
    check_state(x)
    first, last = read_ends(sigma_min, sigma_max, eta)
    steps = plans.fast_steps(n)
    times = torch.linspace(first, last, steps + 1, device=x.device)
    host = torch.linspace(first, last, steps + 1) if times.device.type != "cpu" else times
    levels = tuple(host.double().neg().exp().tolist())
    plan = plans.dpm_fast(levels, n, *plans.noise_options(eta, s_noise))
    sigmas = [time.neg().exp() for time in times]
    noise = noise_or_default(noise_sampler, x)

    def draw(step: int, call: int, dtype: torch.dtype) -> Tensor | None:
        return noise(sigmas[step], sigmas[step + 1]) if call + 1 == plan.counts[step] else None

    def told(info):
        callback({**info, "t": times[info["i"]], "t_up": times[info["i"]]})

    with tqdm(total=n, disable=disable) as bar:

        def counted(x, sigma, **arguments):
            denoised = model(x, sigma, **arguments)
            bar.update()
            return denoised

        listener = None if callback is None else told
        return run(counted, x, sigmas, plan, range(steps), extra_args=extra_args, callback=listener, draw=draw)


@torch.no_grad()
def sample_dpmpp_2s_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None
):
    """u = (q/s) x + (1 - q/s) D, x' = (down/s) x + (1 - down/s) D_u + up s_noise z, q = sqrt(s down), D_u that at u, q.

    (down, up) = `get_ancestral_step`(s, s', eta); a step whose `down` is 0 is Euler's.
    Source: Lu et al. 2022, "DPM-Solver++", algorithm 1; k-diffusion (Katherine Crowson).
    """
    levels = begin(x, sigmas, falling=True)
    if len(levels) == 1:
        return x
    plan = plans.dpmpp_2s_ancestral(levels, sigmas.dtype, *plans.noise_options(eta, s_noise))
    draw = at_the_end(plan, noise_or_default(noise_sampler, x), sigmas, levels)
    return run(model, x, sigmas, plan, steps_of(levels, disable), extra_args=extra_args, callback=callback, draw=draw)


@torch.no_grad()
def sample_dpmpp_sde(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None, r=1 / 2
):
    """u and x' of `fastdiff.samplers.dpmpp_sde`: steps of the SDE to r of the way in log sigma, and to its end.

    Without a noise_sampler the noise of both is that of a Brownian path (torchsde). A step to s' = 0 is Euler's.
    Source: Lu et al. 2022, "DPM-Solver++"; k-diffusion (Katherine Crowson).
    """
    levels = begin(x, sigmas, falling=True)
    if len(levels) == 1:
        return x
    plan = plans.dpmpp_sde(levels, sigmas.dtype, *plans.noise_options(eta, s_noise), plans.node(r))
    spans = [_span(sigma, to, r) for sigma, to, level in zip(sigmas, sigmas[1:], levels[1:], strict=False) if level]
    if noise_sampler is None:
        noise_sampler = brownian(x, levels, sigmas.dtype)
        spans = [*torch.stack(spans).cpu()] if spans else spans

    def draw(step: int, call: int, dtype: torch.dtype) -> Tensor | None:
        if step == len(spans):
            return None
        return noise_sampler(spans[step][0], spans[step][1 + call])

    return run(model, x, sigmas, plan, steps_of(levels, disable), extra_args=extra_args, callback=callback, draw=draw)


def _span(sigma: Tensor, to: Tensor, r: float) -> Tensor:
    """(s, the level r of the way in log sigma, s'), rounded as k-diffusion rounds them: a path is told exact times."""
    t, end = sigma.log().neg(), to.log().neg()
    return torch.stack([t.neg().exp(), (t + (end - t) * r).neg().exp(), end.neg().exp()])


@torch.no_grad()
def sample_dpmpp_2m(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """x' = (s'/s) x + (1 - e^-h) (D + (h / 2 h0) (D - D0)).

    The first step and one to s' = 0 have no D0. Source: Lu et al. 2022, "DPM-Solver++", algorithm 2.
    """
    levels = begin(x, sigmas)
    if len(levels) == 1:
        return x
    plan = plans.dpmpp_2m(levels, sigmas.dtype)
    return run(model, x, sigmas, plan, steps_of(levels, disable), extra_args=extra_args, callback=callback)


@torch.no_grad()
def sample_dpmpp_2m_sde(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    eta=1.0,
    s_noise=1.0,
    noise_sampler=None,
    solver_type="midpoint",
):
    """x' = (s'/s) e^(-eta h) x + (1 - e^-k) D + c (h/h0) (D - D0) + s' sqrt(1 - e^(-2 eta h)) s_noise z.

    k = (1 + eta) h; c = (1 - e^-k)/2 with solver_type "midpoint", 1 - (1 - e^-k)/k with "heun". A step to s' = 0 gives
    D. Without a noise_sampler the noise is that of a Brownian path (torchsde).
    Source: Lu et al. 2022, "DPM-Solver++"; k-diffusion (Katherine Crowson).
    """
    choice("sample_dpmpp_2m_sde", "solver_type", solver_type, SOLVERS)
    levels = begin(x, sigmas, falling=True)
    if len(levels) == 1:
        return x
    plan = plans.dpmpp_2m_sde(levels, sigmas.dtype, *plans.noise_options(eta, s_noise), solver_type)
    draw = _sde_noise(plan, x, sigmas, levels, eta, noise_sampler)
    return run(model, x, sigmas, plan, steps_of(levels, disable), extra_args=extra_args, callback=callback, draw=draw)


@torch.no_grad()
def sample_dpmpp_3m_sde(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None
):
    """The third order of `sample_dpmpp_2m_sde` with "heun": a parabola through three D, of half the curvature.

    Source: k-diffusion (Katherine Crowson), after Lu et al. 2022, "DPM-Solver++".
    """
    levels = begin(x, sigmas, falling=True)
    if len(levels) == 1:
        return x
    plan = plans.dpmpp_3m_sde(levels, sigmas.dtype, *plans.noise_options(eta, s_noise))
    draw = _sde_noise(plan, x, sigmas, levels, eta, noise_sampler)
    return run(model, x, sigmas, plan, steps_of(levels, disable), extra_args=extra_args, callback=callback, draw=draw)


def _sde_noise(
    plan: Plan, x: Tensor, sigmas: Tensor, levels: plans.Levels, eta: float, noise_sampler: NoiseSampler | None
) -> Draw | None:
    if noise_sampler is None:
        noise_sampler, sigmas = brownian(x, levels, sigmas.dtype), torch.tensor(levels, dtype=sigmas.dtype)
    return at_the_end(plan, noise_sampler, sigmas, levels) if eta else None
