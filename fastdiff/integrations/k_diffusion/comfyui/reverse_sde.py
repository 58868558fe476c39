"""ComfyUI's samplers of reverse SDEs: ER-SDE, SEEDS and SA-Solver, on a flow in log((1 - s)/s).

`samplers` says what they have in common.
"""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.errors import InputError
from fastdiff.integrations.k_diffusion.comfyui import plans
from fastdiff.integrations.k_diffusion.comfyui.running import Run, run_of

# Where the numbers of a solver have names in both.
SOLVERS = {"phi_1": "midpoint", "phi_2": "heun"}
# Between these shares of the way SA-Solver adds noise.
TAU_FROM, TAU_TO = 0.2, 0.8


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
