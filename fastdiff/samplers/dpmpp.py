"""DPM-Solver++, multistep, of order 1 to 3, and its SDE form.

Lu et al. 2022, "DPM-Solver++", algorithm 2 and section 5; the SDE form with eta and its third order are those of
k-diffusion (Katherine Crowson).
"""

import math
from collections.abc import Iterator
from typing import Any

from fastdiff.samplers.churn import CHURN_OPTIONS, churn_from
from fastdiff.samplers.exponential import SOLVERS, Data
from fastdiff.samplers.multistep import LOWERED, Step, plan, step_row
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, fraction, make_table, whole

CURVATURES = ("exact", "half")


def dpmpp_2m(problem: Problem, *, order: int = 2, **options: Any) -> StepTable:
    """x' = (sigma'/sigma) x + alpha' (1 - e^-h) D + c (h/h0) (D - D0), h and h0 this and the last step in lambda.

    lambda = log(alpha/sigma); D0 is the data prediction of the step before. c = alpha' (1 - e^-h)/2 for
    solver="midpoint", alpha' (1 - (1 - e^-h)/h) for "heun".
    The first step has no D0 and is of order 1; so is a step to sigma' = 0, where h is infinite.
    order               2, or 1 for steps without D0
    lower_order_final   whether the last step is of order 1 in any case; None: where there are fewer than 15 steps
    euler_at_final      whether the last step is of order 1 in any case, however many there are
    s_churn, s_tmin, s_tmax, s_noise   those of Karras et al. 2022, algorithm 2: each step starts at a level that
                        `churn.Churn` raises; D0 and h0 are those of the raised levels. With s_churn > 0 the method is
                        stochastic. D - D0 holds fresh noise too, which h/h0 amplifies: keep s_churn below the range of
                        lambda, 10 or so, or take order=1.
    """
    return _ode("dpmpp_2m", problem, whole("dpmpp_2m", "order", order, 1, 2), **options)


def dpmpp_3m(problem: Problem, **options: Any) -> StepTable:
    """x' = (sigma'/sigma) x + alpha' int_0^h e^(u - h) P(u) du, P the parabola through the last three D in lambda.

    The second step is `dpmpp_2m`'s, with its solver; so is the last but one with lower_order_final.
    curvature           of P: "exact", or "half" of it, as in the authors' code and diffusers, whose second difference
                        lacks a factor of 2. With half of it the method is of order 2.
    The other options are those of `dpmpp_2m`.
    """
    return _ode("dpmpp_3m", problem, 3, **options)


def dpmpp_2m_sde(problem: Problem, *, order: int = 2, **options: Any) -> StepTable:
    """x' = (sigma'/sigma) e^(-eta h) x + alpha' (1 - e^-k) D + c (h/h0) (D - D0) + sigma' sqrt(1 - e^(-2 eta h)) z.

    k = (1 + eta) h; c is that of `dpmpp_2m` with k in place of h. The step to sigma' = 0 adds no noise.
    eta                 from 0, `dpmpp_2m`, to 10; 1, the default, is the reverse SDE
    s_noise             the noise is multiplied by it
    order, solver, lower_order_final, euler_at_final   those of `dpmpp_2m`
    """
    return _sde("dpmpp_2m_sde", problem, whole("dpmpp_2m_sde", "order", order, 1, 2), **options)


def dpmpp_3m_sde(problem: Problem, *, solver: str = "heun", **options: Any) -> StepTable:
    """The third order of `dpmpp_2m_sde`: `dpmpp_3m` with (1 + eta) h for h in the exponential, and the same noise.

    solver              that of the second step, which has one earlier D: "heun" is k-diffusion's, "midpoint" diffusers'
    curvature           that of `dpmpp_3m`: "half" is k-diffusion's; "half_offset" is diffusers', half of it
                        less 1/k by a wrong sign: an error as large as the curvature itself, which leaves order 1 and
                        grows from step to step where there are hundreds.
    The other options are those of `dpmpp_2m_sde`.
    """
    return _sde("dpmpp_3m_sde", problem, 3, solver=solver, **options)


def _ode(
    method: str,
    problem: Problem,
    order: int,
    *,
    solver: str = "midpoint",
    curvature: str = "exact",
    lower_order_final: bool | None = None,
    euler_at_final: bool = False,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> StepTable:
    choice(method, "solver", solver, SOLVERS)
    choice(method, "curvature", curvature, CURVATURES)
    churn = churn_from(method, s_churn, s_tmin, s_tmax, s_noise)
    steps = plan(
        method, problem, order, lower_order_final=lower_order_final, euler_at_final=euler_at_final, churn=churn
    )
    scale = churn.init_scale(problem, problem.points()[0].init_scale, scaled=False)
    return make_table(method, problem, _rows(problem, steps, 0.0, 0.0, solver, curvature), init_scale=scale)


def _sde(
    method: str,
    problem: Problem,
    order: int,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver: str = "midpoint",
    curvature: str = "exact",
    lower_order_final: bool | None = None,
    euler_at_final: bool = False,
) -> StepTable:
    choice(method, "solver", solver, SOLVERS)
    choice(method, "curvature", curvature, (*CURVATURES, "half_offset"))
    eta = fraction(method, "eta", eta, high=10.0)
    s_noise = fraction(method, "s_noise", s_noise, high=10.0)
    steps = plan(method, problem, order, lower_order_final=lower_order_final, euler_at_final=euler_at_final)
    return make_table(method, problem, _rows(problem, steps, eta, s_noise, solver, curvature))


def _rows(
    problem: Problem, steps: list[Step], eta: float, s_noise: float, solver: str, curvature: str
) -> Iterator[Row]:
    for step in steps:
        noise_kept = step.decay**eta
        propagation = Data.propagate(step.start, step.end.alpha, step.end.ratio * noise_kept)
        yield step_row(
            problem,
            step,
            Data,
            propagation,
            solver,
            noise=step.end.sigma * math.sqrt(max(1.0 - noise_kept**2, 0.0)) * s_noise,
            curvature=curvature,
        )


DIFFUSERS = {"spacing": "linspace", "endpoint": False}

DPMPP_2M = MethodInfo(
    name="dpmpp_2m",
    paper="Lu et al. 2022, DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
    order=2,
    stochastic=False,
    evaluations_per_step=1,
    history=1,
    options={"order": 2, "solver": "midpoint", **LOWERED, **CHURN_OPTIONS},
    diffusers=DIFFUSERS,
    rows=dpmpp_2m,
)
DPMPP_3M = MethodInfo(
    name="dpmpp_3m",
    paper="Lu et al. 2022, DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
    order=3,
    stochastic=False,
    evaluations_per_step=1,
    history=2,
    options={"solver": "midpoint", "curvature": "exact", **LOWERED, **CHURN_OPTIONS},
    diffusers={**DIFFUSERS, "curvature": "half"},
    rows=dpmpp_3m,
)
DPMPP_2M_SDE = MethodInfo(
    name="dpmpp_2m_sde",
    paper="Lu et al. 2022, DPM-Solver++; Crowson 2022, k-diffusion",
    order=2,
    stochastic=True,
    evaluations_per_step=1,
    history=1,
    options={"order": 2, "eta": 1.0, "s_noise": 1.0, "solver": "midpoint", **LOWERED},
    diffusers=DIFFUSERS,
    rows=dpmpp_2m_sde,
)
DPMPP_3M_SDE = MethodInfo(
    name="dpmpp_3m_sde",
    paper="Crowson 2022, k-diffusion; Lu et al. 2022, DPM-Solver++",
    order=3,
    stochastic=True,
    evaluations_per_step=1,
    history=2,
    options={"eta": 1.0, "s_noise": 1.0, "solver": "heun", "curvature": "exact", **LOWERED},
    diffusers={**DIFFUSERS, "solver": "midpoint", "curvature": "half_offset"},
    rows=dpmpp_3m_sde,
)
