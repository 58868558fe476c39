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

# Where the numbers of a solver have names in both.
SOLVERS = {"phi_1": "midpoint", "phi_2": "heun"}
POLYNOMIALS = {"tab": "time", "rhoab": "rho"}
# Between these shares of the way SA-Solver adds noise.
TAU_FROM, TAU_TO = 0.2, 0.8


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


@torch.no_grad()
def sample_er_sde(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    s_noise=1.0,
    noise_sampler=None,
    noise_scaler=None,
    max_stage=3,
):
    """ER-SDE-Solver-3, its integrals sums of 200 points.

    noise_scaler   phi as a function of a tensor of levels sigma/alpha; None: r (exp(r^0.3) + 10)
    """
    run = run_of(model, x, sigmas, extra_args, finite=True)
    if not run.steps:
        return x

    def quotient(ratio: float) -> float:
        return float(noise_scaler(torch.tensor(ratio, dtype=torch.float64))) / ratio

    s_noise = run.scaled(s_noise)
    plan = plans.er_sde(run.levels, run.flow, max_stage, s_noise, None if noise_scaler is None else quotient)
    draw = run.at_the_end(plan, run.noise(noise_sampler)) if s_noise > 0.0 else None
    return run.sample(plan, callback, disable, draw=draw)


@torch.no_grad()
def sample_seeds_2(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    eta=1.0,
    s_noise=1.0,
    noise_sampler=None,
    r=0.5,
    solver_type="phi_1",
):
    """SEEDS-2; solver_type "phi_1" is the midpoint rule, "phi_2" Heun's."""
    if solver_type not in SOLVERS:
        raise InputError(f"solver_type: expected one of {', '.join(SOLVERS)}, got {solver_type!r}")
    options = {"r": float(r), "solver": SOLVERS[solver_type]}
    return _seeds("seeds_2", 2, options, model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler)


@torch.no_grad()
def sample_seeds_3(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    eta=1.0,
    s_noise=1.0,
    noise_sampler=None,
    r_1=1.0 / 3,
    r_2=2.0 / 3,
):
    """SEEDS-3 with inner points at r_1 and r_2 of the way in lambda."""
    options = {"r1": float(r_1), "r2": float(r_2)}
    return _seeds("seeds_3", 3, options, model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler)


@torch.no_grad()
def sample_exp_heun_2_x0(model, x, sigmas, extra_args=None, callback=None, disable=None, solver_type="phi_2"):
    """The exponential Heun method in the data prediction: SEEDS-2 without noise, whose inner point is the end."""
    return sample_seeds_2(model, x, sigmas, extra_args, callback, disable, 0.0, 0.0, None, 1.0, solver_type)


@torch.no_grad()
def sample_exp_heun_2_x0_sde(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=None,
    eta=1.0,
    s_noise=1.0,
    noise_sampler=None,
    solver_type="phi_2",
):
    """SEEDS-2 whose inner point is the end. Noise is drawn twice a step, of which the second is not added."""
    return sample_seeds_2(
        model, x, sigmas, extra_args, callback, disable, eta, s_noise, noise_sampler, 1.0, solver_type
    )


def _seeds(
    name: str,
    calls: int,
    options: dict[str, Any],
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
    run = run_of(model, x, sigmas, extra_args, finite=True)
    if not run.steps:
        return x
    scaled = run.scaled(s_noise)
    options = {**options, "eta": float(eta), "s_noise": scaled}
    plan = plans.method(name, run.levels, options, flow=run.flow, calls=calls)
    noisy = eta > 0.0 and scaled > 0.0
    draw = run.between_calls(plan, run.noise(noise_sampler)) if noisy else None
    return run.sample(plan, callback, disable, draw=draw)


@torch.no_grad()
def sample_sa_solver(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=False,
    tau_func=None,
    s_noise=1.0,
    noise_sampler=None,
    predictor_order=3,
    corrector_order=4,
    use_pece=False,
    simple_order_2=False,
):
    """SA-Solver, of falling order before a last step to 0.

    tau_func          tau of a step from the level at its end; None: 1 between 20 % and 80 % of the way, as the model's
                      percent_to_sigma has it, else 0
    predictor_order   1 to 4, corrector_order 0 to 5
    use_pece          whether the model is called again at each corrected state
    simple_order_2    whether two predictions are interpolated as the paper's appendix D simplifies it
    """
    run = run_of(model, x, sigmas, extra_args, finite=True)
    if not run.steps:
        return x
    taus, s_noise = _taus(run, tau_func), run.scaled(s_noise)
    orders = _order("predictor_order", predictor_order, 1, 4), _order("corrector_order", corrector_order, 0, 5)
    plan = plans.sa_solver(run.levels, run.flow, *orders, taus, s_noise, bool(use_pece), bool(simple_order_2))
    source = run.at_the_end(plan, run.noise(noise_sampler))

    def draw(step, call, dtype):
        return source(step, call, dtype) if taus[step] > 0.0 and s_noise > 0.0 else None

    return run.sample(plan, callback, disable, draw=draw)


@torch.no_grad()
def sample_sa_solver_pece(
    model,
    x,
    sigmas,
    extra_args=None,
    callback=None,
    disable=False,
    tau_func=None,
    s_noise=1.0,
    noise_sampler=None,
    predictor_order=3,
    corrector_order=4,
    simple_order_2=False,
):
    """`sample_sa_solver` with use_pece."""
    options = {"tau_func": tau_func, "s_noise": s_noise, "noise_sampler": noise_sampler, "use_pece": True}
    orders = {"predictor_order": predictor_order, "corrector_order": corrector_order, "simple_order_2": simple_order_2}
    return sample_sa_solver(model, x, sigmas, extra_args, callback, disable, **options, **orders)


def _taus(run: Run, tau_func: Any) -> tuple[float, ...]:
    """tau of each step; 0 of one to the data."""
    if tau_func is not None:
        ends = zip(run.sigmas[1:], run.levels[1:], strict=True)
        return tuple(float(tau_func(sigma)) if level else 0.0 for sigma, level in ends)
    if not hasattr(run.sampling, "percent_to_sigma"):
        raise InputError(
            "tau_func: the model has no percent_to_sigma to find its noisy levels by; pass lambda sigma: 1.0, or 0.0 "
            "for no noise"
        )
    high, low = (float(run.sampling.percent_to_sigma(share)) for share in (TAU_FROM, TAU_TO))
    return tuple(1.0 if level and low <= level <= high else 0.0 for level in run.levels[1:])


def _order(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"sample_sa_solver: {name}: expected a whole number from {low} to {high}, got {value!r}")
    return value
