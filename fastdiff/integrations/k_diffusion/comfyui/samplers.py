"""The samplers that ComfyUI has besides k-diffusion's, by its names, signatures, draws of noise and numbers.

`k_diffusion.sampling` says what their arguments have in common. Here, noise is of the seed in extra_args (`model`), and
the model says by its `model_sampling` whether its levels are those of a flow. The formulas and their papers stand with
the rows in `fastdiff.samplers`.
"""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.errors import InputError
from fastdiff.integrations.k_diffusion.comfyui import plans
from fastdiff.integrations.k_diffusion.comfyui.running import Run, run_of

POLYNOMIALS = {"tab": "time", "rhoab": "rho"}


@torch.no_grad()
def sample_ddpm(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
    """DDPM's posterior, x' = D + (s'/s)^2 (x - D) + s' sqrt(1 - (s'/s)^2) z: an ancestral step of Euler's method."""
    run = run_of(model, x, sigmas, extra_args)
    if not run.steps:
        return x
    plan = plans.method("euler_ancestral", run.levels, {}, promotes=True, data=False)
    return run.sample(plan, callback, disable, draw=run.at_the_end(plan, run.noise(noise_sampler)))


@torch.no_grad()
def sample_lcm(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    noise_sampler=None,
    s_noise=1.0,
    s_noise_end=None,
    noise_clip_std=0.0,
):
    """x' = D and noise of level s' as the model mixes them (its noise_scaling): D + s' z, on a flow (1 - s') D + s' z.

    s_noise, s_noise_end   what noise is multiplied by in the first and the last step, linearly between; None: the same
    noise_clip_std         noise is clamped to so many of its own standard deviations; 0: not at all
    """
    run = run_of(model, x, sigmas, extra_args)
    if not run.steps:
        return x
    last = s_noise if s_noise_end is None else s_noise_end
    scales = []
    for i, level in enumerate(run.levels[1:]):
        signal, noise = _mix(run, level)
        scales.append((signal, noise * (s_noise + (last - s_noise) * (i / max(run.steps - 1, 1)))))
    plan = plans.lcm(run.levels, tuple(scales))
    source = run.noise(noise_sampler)

    def clipped(sigma, sigma_next):
        noise = source(sigma, sigma_next)
        bound = noise_clip_std * noise.std()
        return noise.clamp(min=-bound, max=bound)

    return run.sample(plan, callback, disable, draw=run.at_the_end(plan, clipped if noise_clip_std > 0.0 else source))


def _mix(run: Run, level: float) -> tuple[float, float]:
    """What D and z are multiplied by at a level: noise_scaling of z = (1, 0) and D = (0, 1)."""
    if level == 0.0 or not hasattr(run.sampling, "noise_scaling"):
        return 1.0, level
    pair = torch.eye(2, dtype=torch.float64)
    noise, signal = run.sampling.noise_scaling(torch.tensor(level, dtype=torch.float64), pair[0], pair[1]).tolist()
    return signal, noise


@torch.no_grad()
def sample_ipndm(model, x, sigmas, extra_args=None, callback=None, disable=None, max_order=4):
    """iPNDM of order 1 to 4. The callback is told the first state as x at every step."""
    return _multistep("ipndm", {"order": max_order}, model, x, sigmas, extra_args, callback, disable)


@torch.no_grad()
def sample_ipndm_v(model, x, sigmas, extra_args=None, callback=None, disable=None, max_order=4):
    """iPNDM for steps of any length, of order 1 to 4, with the weights of the released code. The callback is told the
    first state as x at every step."""
    options = {"order": max_order, "weights": "published"}
    return _multistep("ipndm_v", options, model, x, sigmas, extra_args, callback, disable)


@torch.no_grad()
def sample_deis(model, x, sigmas, extra_args=None, callback=None, disable=None, max_order=3, deis_mode="tab"):
    """DEIS of order 1 to 4 with polynomials in time ("tab") or in sigma ("rhoab"). The callback is told the first state
    as x at every step."""
    if deis_mode not in POLYNOMIALS:
        raise InputError(f"sample_deis: deis_mode: expected one of {', '.join(POLYNOMIALS)}, got {deis_mode!r}")
    options = {"order": max_order, "lower_order_final": False, "polynomial": POLYNOMIALS[deis_mode]}
    if deis_mode == "tab":
        options["points"] = plans.DEIS_POINTS
    return _multistep("deis", options, model, x, sigmas, extra_args, callback, disable)


def _multistep(
    name: str, options: dict[str, Any], model: Any, x: Any, sigmas: Any, extra_args: Any, callback: Any, disable: Any
) -> Any:
    run = run_of(model, x, sigmas, extra_args)
    if not run.steps:
        return x
    plan = plans.method(name, run.levels, options, promotes=False, data=name != "deis")
    return run.sample(plan, None if callback is None else lambda info: callback({**info, "x": x}), disable)


@torch.no_grad()
def sample_res_multistep(
    model, x, sigmas, extra_args=None, callback=None, disable=None, s_noise=1.0, noise_sampler=None
):
    """The refined exponential multistep method of order 2. Noise is drawn at every step, and not added."""
    return _refined(model, x, sigmas, extra_args, callback, disable, 0.0, s_noise, noise_sampler)


@torch.no_grad()
def sample_res_multistep_ancestral(
    model, x, sigmas, extra_args=None, callback=None, disable=None, eta=1.0, s_noise=1.0, noise_sampler=None
):
    """The refined exponential multistep method, going down to `get_ancestral_step`'s level and adding noise."""
    return _refined(model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler)


def _refined(
    model: Any,
    x: Any,
    sigmas: Any,
    extra_args: Any,
    callback: Any,
    disable: Any,
    eta: float,
    s_noise: float,
    noise_sampler: Any,
) -> Any:
    run = run_of(model, x, sigmas, extra_args)
    if not run.steps:
        return x
    options = {"eta": float(eta), "s_noise": run.scaled(s_noise)}
    plan = plans.method("res_multistep", run.levels, options, promotes=False, data=False)
    return run.sample(plan, callback, disable, draw=run.at_the_end(plan, run.noise(noise_sampler)))


@torch.no_grad()
def sample_gradient_estimation(model, x, sigmas, extra_args=None, callback=None, disable=None, ge_gamma=2.0):
    """Gradient estimation with gamma = ge_gamma."""
    run = run_of(model, x, sigmas, extra_args)
    if not run.steps:
        return x
    plan = plans.method("gradient_estimation", run.levels, {"gamma": float(ge_gamma)}, promotes=True)
    return run.sample(plan, callback, disable)
