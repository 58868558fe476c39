"""DPM-Solver, multistep, of order 1 to 3, and its SDE form: the noise prediction integrated in lambda.

Lu et al. 2022, "DPM-Solver", equation 3.4 and appendix B; Lu et al. 2022, "DPM-Solver++", section 5, for the SDE.
"""

import math
from collections.abc import Iterator

from fastdiff.samplers.exponential import SOLVERS, Data, Form, Noise
from fastdiff.samplers.multistep import LOWERED, Step, plan, step_row
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.table import MethodInfo, Row, StepTable, choice, fraction, make_table, whole

CURVATURES = ("exact", "half")


def dpm_solver(
    problem: Problem,
    *,
    order: int = 2,
    solver: str = "midpoint",
    curvature: str = "exact",
    lower_order_final: bool | None = None,
    euler_at_final: bool = False,
) -> StepTable:
    """x' = (alpha'/alpha) x - sigma' int_0^h e^(h - u) P(u) du, P the polynomial through the last `order` epsilon.

    h is the step in lambda = log(alpha/sigma), h0 the last one. Order 1 is DDIM. Order 2 is

        x' = (alpha'/alpha) x - sigma' (e^h - 1) epsilon - c (h/h0) (epsilon - epsilon_0),

    c = sigma' (e^h - 1)/2 for solver="midpoint", sigma' ((e^h - 1)/h - 1) for "heun". The first step is of order 1, the
    second at most 2; a step to sigma' = 0 is of order 1.
    order               1 to 3
    solver              "midpoint" or "heun": c of steps of order 2
    curvature           of the parabola of order 3: "exact", or "half" of it, as in the authors' code and diffusers,
                        whose second difference lacks a factor of 2. With half of it the method is of order 2.
    lower_order_final   whether the last step is of order 1 and the one before it of order 2 in any case; None: where
                        there are fewer than 15 steps
    euler_at_final      whether the last step is of order 1 in any case, however many there are
    """
    choice("dpm_solver", "solver", solver, SOLVERS)
    choice("dpm_solver", "curvature", curvature, CURVATURES)
    order = whole("dpm_solver", "order", order, 1, 3)
    steps = plan("dpm_solver", problem, order, lower_order_final=lower_order_final, euler_at_final=euler_at_final)
    return make_table("dpm_solver", problem, _rows(problem, steps, 0.0, 0.0, solver, curvature))


def dpm_solver_sde(
    problem: Problem,
    *,
    order: int = 2,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver: str = "midpoint",
    lower_order_final: bool | None = None,
    euler_at_final: bool = False,
) -> StepTable:
    """`dpm_solver` of order 1 or 2 with (1 + eta) times its integral, and s_noise sigma' sqrt(eta (e^(2h) - 1)) z.

    eta = 0 is `dpm_solver`; eta = 1 is the reverse SDE. The step to sigma' = 0 is DDIM's and adds no noise. Where
    a step starts without signal there is no finite step: InputError.
    eta                 from 0 to 1
    s_noise             the noise is multiplied by it
    solver, lower_order_final, euler_at_final   those of `dpm_solver`

    In epsilon the steps at large noise multiply what came before, so that it wants 50 steps or more where
    `dpmpp_2m_sde` wants 20; even timesteps on the cosine schedule give noise alone, hence the Karras grid.
    """
    choice("dpm_solver_sde", "solver", solver, SOLVERS)
    order = whole("dpm_solver_sde", "order", order, 1, 2)
    eta = fraction("dpm_solver_sde", "eta", eta)
    s_noise = fraction("dpm_solver_sde", "s_noise", s_noise, high=10.0)
    steps = plan("dpm_solver_sde", problem, order, lower_order_final=lower_order_final, euler_at_final=euler_at_final)
    return make_table("dpm_solver_sde", problem, _rows(problem, steps, eta, s_noise, solver, "exact"))


def _rows(
    problem: Problem, steps: list[Step], eta: float, s_noise: float, solver: str, curvature: str
) -> Iterator[Row]:
    for step in steps:
        start, end = step.start, step.end
        strength = eta if end.sigma > 0.0 else 0.0
        form: Form = Noise
        propagation = Noise.propagate(start, end.alpha, end.ratio, gain=1.0 + strength)
        if strength == 0.0 and (start.alpha == 0.0 or end.sigma == 0.0):
            # DDIM from D is the same, and finite here.
            form, propagation = Data, Data.propagate(start, end.alpha, end.ratio)
        yield step_row(
            problem,
            step,
            form,
            propagation,
            solver,
            noise=s_noise * end.alpha * math.sqrt(strength * (start.ratio**2 - end.ratio**2)) if strength else 0.0,
            curvature=curvature,
        )


# Their grid to the schedule's own end: their class refuses to end at the data.
DIFFUSERS = {"spacing": "linspace", "endpoint": False, "final_sigma": "schedule"}

DPM_SOLVER = MethodInfo(
    name="dpm_solver",
    paper="Lu et al. 2022, DPM-Solver: A Fast ODE Solver for Diffusion Probabilistic Model Sampling in Around 10 Steps",
    order=2,
    stochastic=False,
    evaluations_per_step=1,
    history=1,
    options={"order": 2, "solver": "midpoint", "curvature": "exact", **LOWERED},
    diffusers={**DIFFUSERS, "curvature": "half"},
    rows=dpm_solver,
)
DPM_SOLVER_SDE = MethodInfo(
    name="dpm_solver_sde",
    paper="Lu et al. 2022, DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models",
    order=2,
    stochastic=True,
    evaluations_per_step=1,
    history=1,
    options={"order": 2, "eta": 1.0, "s_noise": 1.0, "solver": "midpoint", **LOWERED},
    diffusers=DIFFUSERS,
    rows=dpm_solver_sde,
    grid={"spacing": "karras"},
)
