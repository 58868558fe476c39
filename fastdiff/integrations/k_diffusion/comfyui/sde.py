"""ComfyUI's DPM-Solver++ samplers of the reverse SDE, of a flow in log((1 - s)/s).

Without a noise_sampler the noise is that of a Brownian path over the levels, of the seed in extra_args: on the host, or
with "_gpu" on the state's device. k-diffusion's own where `model.conventions` says that another calls.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.integrations.k_diffusion import plans as k_plans
from fastdiff.integrations.k_diffusion import sampling
from fastdiff.integrations.k_diffusion.comfyui import plans
from fastdiff.integrations.k_diffusion.comfyui.model import NoiseSampler, conventions
from fastdiff.integrations.k_diffusion.comfyui.running import Run, run_of
from fastdiff.integrations.k_diffusion.noise import BatchedBrownianTree, BrownianTreeNoiseSampler
from fastdiff.samplers.exponential import SOLVERS


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
    """`sampling.sample_dpmpp_2m_sde`."""
    options = (eta, s_noise, noise_sampler, solver_type)
    if not conventions(model, extra_args):
        return sampling.sample_dpmpp_2m_sde(model, x, sigmas, extra_args, callback, disable, *options)
    return _second(model, x, sigmas, extra_args, callback, disable, *options, cpu=True)


@torch.no_grad()
def sample_dpmpp_2m_sde_gpu(
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
    """`sample_dpmpp_2m_sde` with a path on the state's device."""
    options = (eta, s_noise, noise_sampler, solver_type)
    return _second(model, x, sigmas, extra_args, callback, disable, *options, cpu=False)


@torch.no_grad()
def sample_dpmpp_2m_sde_heun(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    eta=1.0,
    s_noise=1.0,
    noise_sampler=None,
    solver_type="heun",
):
    """`sample_dpmpp_2m_sde` with solver_type "heun"."""
    options = (eta, s_noise, noise_sampler, solver_type)
    return _second(model, x, sigmas, extra_args, callback, disable, *options, cpu=True)


@torch.no_grad()
def sample_dpmpp_2m_sde_heun_gpu(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    eta=1.0,
    s_noise=1.0,
    noise_sampler=None,
    solver_type="heun",
):
    """`sample_dpmpp_2m_sde_heun` with a path on the state's device."""
    options = (eta, s_noise, noise_sampler, solver_type)
    return _second(model, x, sigmas, extra_args, callback, disable, *options, cpu=False)


@torch.no_grad()
def sample_dpmpp_3m_sde(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None
):
    """`sampling.sample_dpmpp_3m_sde`."""
    if not conventions(model, extra_args):
        return sampling.sample_dpmpp_3m_sde(
            model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler
        )
    return _third(model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, cpu=True)


@torch.no_grad()
def sample_dpmpp_3m_sde_gpu(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None
):
    """`sample_dpmpp_3m_sde` with a path on the state's device."""
    return _third(model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, cpu=False)


@torch.no_grad()
def sample_dpmpp_sde(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None, r=1 / 2
):
    """`sampling.sample_dpmpp_sde`."""
    options = (eta, s_noise, noise_sampler, r)
    if not conventions(model, extra_args):
        return sampling.sample_dpmpp_sde(model, x, sigmas, extra_args, callback, disable, *options)
    return _two_calls(model, x, sigmas, extra_args, callback, disable, *options, cpu=True)


@torch.no_grad()
def sample_dpmpp_sde_gpu(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None, r=1 / 2
):
    """`sample_dpmpp_sde` with a path on the state's device."""
    options = (eta, s_noise, noise_sampler, r)
    return _two_calls(model, x, sigmas, extra_args, callback, disable, *options, cpu=False)


def _second(
    model: Any,
    x: Any,
    sigmas: Any,
    extra_args: Any,
    callback: Any,
    disable: Any,
    eta: float,
    s_noise: float,
    noise_sampler: Any,
    solver_type: str,
    *,
    cpu: bool,
) -> Any:
    if solver_type not in SOLVERS:
        raise InputError(f"solver_type: expected one of {', '.join(SOLVERS)}, got {solver_type!r}")
    options = {"solver": solver_type}
    given = (model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler)
    return _multistep("dpmpp_2m_sde", options, *given, cpu=cpu)


def _third(*given: Any, cpu: bool) -> Any:
    return _multistep("dpmpp_3m_sde", {"curvature": "half"}, *given, cpu=cpu)


def _multistep(
    name: str,
    options: dict[str, Any],
    model: Any,
    x: Any,
    sigmas: Any,
    extra_args: Any,
    callback: Any,
    disable: Any,
    eta: float,
    s_noise: float,
    noise_sampler: NoiseSampler | None,
    *,
    cpu: bool,
) -> Any:
    run = run_of(model, x, sigmas, extra_args, finite=True)
    if not run.steps:
        return x
    scaled = run.scaled(s_noise)
    options = {**options, "eta": float(eta), "s_noise": scaled, "lower_order_final": False}
    plan = plans.method(name, run.levels, options, flow=run.flow)
    if not (eta > 0.0 and scaled > 0.0):
        return run.sample(plan, callback, disable)
    levels = run.sigmas if noise_sampler else run.sigmas.cpu()
    made = noise_sampler or _path(run, sigmas, cpu)

    def draw(step: int, call: int, dtype: torch.dtype) -> Tensor | None:
        return made(levels[step], levels[step + 1]) if run.levels[step + 1] else None

    return run.sample(plan, callback, disable, draw=draw)


def _two_calls(
    model: Any,
    x: Any,
    sigmas: Any,
    extra_args: Any,
    callback: Any,
    disable: Any,
    eta: float,
    s_noise: float,
    noise_sampler: NoiseSampler | None,
    r: float,
    *,
    cpu: bool,
) -> Any:
    run = run_of(model, x, sigmas, extra_args, finite=True)
    if not run.steps:
        return x
    scaled = run.scaled(s_noise)
    made_by = plans.dpmpp_sde_on_flow if run.flow else k_plans.dpmpp_sde
    plan = made_by(run.levels, sigmas.dtype, float(eta), scaled, float(r))
    if not (eta > 0.0 and scaled > 0.0):
        return run.sample(plan, callback, disable)
    inner, levels = _inner_levels(run, r), run.sigmas
    if noise_sampler is None:
        inner, levels = inner.cpu(), levels.cpu()
    made = noise_sampler or _path(run, sigmas, cpu)

    def draw(step: int, call: int, dtype: torch.dtype) -> Tensor | None:
        if run.levels[step + 1] == 0.0:
            return None
        return made(levels[step], levels[step + 1] if call else inner[step])

    return run.sample(plan, callback, disable, draw=draw)


def _inner_levels(run: Run, r: float) -> Tensor:
    """r of the way in lambda, rounded as ComfyUI rounds them: a path is told exact times."""
    half = [sigma.logit().neg() if run.flow else sigma.log().neg() for sigma in run.sigmas]
    inner = [start + r * (end - start) for start, end in pairwise(half)]
    return torch.stack([level.neg().sigmoid() if run.flow else level.neg().exp() for level in inner])


def _path(run: Run, sigmas: Tensor, cpu: bool) -> NoiseSampler:
    """A Brownian path over the caller's levels."""
    seed, ends = (run.extra_args or {}).get("seed"), sigmas.detach().cpu()
    low, high = ends[ends > 0].min(), ends.max()
    if not cpu:
        return BrownianTreeNoiseSampler(run.x, low, high, seed=seed)
    tree = BatchedBrownianTree(run.x.detach().cpu(), low, high, seed)

    def noise(sigma: Tensor, sigma_next: Tensor) -> Tensor:
        change: Tensor = tree(sigma.float(), sigma_next.float())
        return change.to(run.x.device, sigma.dtype) / (sigma_next - sigma).abs().sqrt()

    return noise
