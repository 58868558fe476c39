"""SA-Solver. Xue et al. 2023, "SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models"."""

from collections.abc import Sequence
from typing import Any

from fastdiff.errors import InputError
from fastdiff.samplers.adams import PREDICTS, Orders, adams_rows
from fastdiff.samplers.problem import Point, Problem
from fastdiff.samplers.table import MethodInfo, StepTable, choice, flag, fraction, make_table, whole


def sa_solver(
    problem: Problem,
    *,
    predictor_order: int = 2,
    corrector_order: int = 2,
    tau: float = 1.0,
    tau_timesteps: Sequence[float] | None = None,
    tau_ratios: Sequence[float] | None = None,
    predict: str = "data",
    simplified: bool = True,
    lower_order_final: bool = True,
    pece: bool = False,
) -> StepTable:
    """x' = (sigma'/sigma) e^(-tau^2 h) x_c + k alpha' int e^(-k(lambda'-l)) P dl + sigma' sqrt(1 - e^(-2 tau^2 h)) z.

    lambda = log(alpha/sigma), h = lambda' - lambda, k = 1 + tau^2. x' is the predictor, with the polynomial P through
    the last `predictor_order` data predictions; x_c' is the same with P through D' at x' and the corrector_order - 1
    before it, and with the same z. tau = 0 is an ODE solver, tau = 1 solves the reverse SDE of the diffusion.

    predictor_order   1 to 4, corrector_order 1 to 4 or 0 (no corrector); the first steps have lower ones
    tau               constant, from 0 to 10, but 0 outside these ranges of the step's first point:
    tau_timesteps     (low, high) of what the network is called with
    tau_ratios        (low, high) of sigma/alpha
    predict           what is interpolated: "data", D; "noise", epsilon, and
                      x' = (alpha'/alpha) x_c - k sigma' int e^(lambda'-l) P dl + tau sigma' sqrt(e^(2h) - 1) z
    simplified        where P is a line and predicts data, the integral of its slope term takes h^2/2 for
                      int e^(-k(lambda'-l)) (l - lambda) dl, as the authors' code and diffusers do
    lower_order_final   the predictor's order is at most the number of steps left, the corrector's one more
    pece                whether D' is computed again from x_c', for the steps after: two network calls a step

    With predict="noise" and tau > 0 the fresh noise changes epsilon from step to step, which large steps multiply: it
    wants 50 steps or more.

    A step to sigma' = 0 has a predictor of order 1 and no noise. diffusers: tau_timesteps=(200, 800), and the last step
    ends at the schedule's own end.
    """
    whole("sa_solver", "predictor_order", predictor_order, 1, 4)
    whole("sa_solver", "corrector_order", corrector_order, 0, 4)
    tau = fraction("sa_solver", "tau", tau, high=10.0)
    choice("sa_solver", "predict", predict, PREDICTS)
    flag("sa_solver", "simplified", simplified)
    flag("sa_solver", "lower_order_final", lower_order_final)
    flag("sa_solver", "pece", pece)
    times, ratios = _range("tau_timesteps", tau_timesteps), _range("tau_ratios", tau_ratios)
    steps = problem.grid.steps

    def tau_at(point: Point) -> float:
        inside = times[0] <= point.timestep <= times[1] and ratios[0] <= point.ratio <= ratios[1]
        return tau if inside else 0.0

    half = "bh1" if simplified and predict == "data" else None
    orders = []
    for i in range(steps):
        left = steps - i if lower_order_final else 4
        predictor = min(predictor_order, left, i + 1)
        corrector = min(corrector_order, left + 1, i + 2) if i + 1 < steps else 0
        orders.append(Orders(predictor, corrector, half))
    return make_table("sa_solver", problem, adams_rows(problem, predict, orders, tau_at, pece=pece))


def _range(name: str, value: Any) -> tuple[float, float]:
    if value is None:
        return 0.0, float("inf")
    numbers = tuple(value) if isinstance(value, list | tuple) else ()
    if len(numbers) != 2 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in numbers):
        raise InputError(f"sa_solver: {name}: expected None or two numbers, such as (0.05, 1.0), got {value!r}")
    if not 0.0 <= numbers[0] <= numbers[1]:
        raise InputError(f"sa_solver: {name}: expected 0 <= low <= high, got {value!r}")
    return float(numbers[0]), float(numbers[1])


INFO = MethodInfo(
    name="sa_solver",
    paper="Xue et al. 2023, SA-Solver: Stochastic Adams Solver for Fast Sampling of Diffusion Models",
    order=2,
    stochastic=True,
    evaluations_per_step=1,
    history=1,
    options={
        "predictor_order": 2,
        "corrector_order": 2,
        "tau": 1.0,
        "tau_timesteps": None,
        "tau_ratios": None,
        "predict": "data",
        "simplified": True,
        "lower_order_final": True,
        "pece": False,
    },
    diffusers={
        "spacing": "linspace",
        "endpoint": False,
        "final_sigma": "schedule",
        "tau_timesteps": (200.0, 800.0),
    },
    rows=sa_solver,
)
