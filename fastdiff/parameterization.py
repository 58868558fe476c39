"""What a network predicts, as linear coefficients: m = c0 x_0 + c1 epsilon, with x = alpha x_0 + sigma epsilon.

Solving the two equations for x_0 and epsilon gives every conversion between predictions.
"""

import difflib
from dataclasses import dataclass

from fastdiff.errors import InputError
from fastdiff.schedules import Schedule

SCHEDULE_KINDS = {"epsilon": ("vp",), "v": ("vp",), "sample": ("vp", "flow"), "flow": ("flow",)}
PREDICTIONS = tuple(SCHEDULE_KINDS)


@dataclass(frozen=True)
class Linear:
    """x_coefficient * x + m_coefficient * m."""

    x: float
    m: float


def check(prediction: str, schedule: Schedule) -> None:
    """InputError unless a network trained on this schedule can make this prediction."""
    kinds = SCHEDULE_KINDS.get(prediction)
    if kinds is None:
        near = difflib.get_close_matches(str(prediction), PREDICTIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"prediction: expected one of {', '.join(PREDICTIONS)}, got {prediction!r}{hint}")
    if schedule.kind not in kinds:
        fitting = ", ".join(name for name, fits in SCHEDULE_KINDS.items() if schedule.kind in fits)
        raise InputError(
            f"prediction: {prediction!r} does not fit the {schedule.kind} schedule {schedule.name!r}; "
            f"expected one of {fitting}"
        )


def input_scale(prediction: str, alpha: float, sigma: float, sigma_data: float = 0.5) -> float:
    """What x is multiplied by before the network sees it."""
    return 1.0


def target(prediction: str, alpha: float, sigma: float, sigma_data: float = 0.5) -> tuple[float, float]:
    """(c0, c1) of what the network is trained to give, m = c0 x_0 + c1 epsilon.

    epsilon (0, 1); sample (1, 0); v (-sigma, alpha), Salimans and Ho 2022; flow (-1, 1) = dx/dt of x = (1-t) x_0 + t
    epsilon, Lipman et al. 2023.
    """
    coefficients = {"epsilon": (0.0, 1.0), "sample": (1.0, 0.0), "v": (-sigma, alpha), "flow": (-1.0, 1.0)}
    if prediction not in coefficients:
        raise InputError(f"prediction: expected one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    return coefficients[prediction]


def data(prediction: str, alpha: float, sigma: float, *, state_scale: float = 1.0, sigma_data: float = 0.5) -> Linear:
    """x_0 = (c1 x - sigma m) / (alpha c1 - sigma c0), for a state y with x = state_scale * y.

    state_scale = alpha is the space of Karras et al. 2022, in which y = x_0 + (sigma / alpha) epsilon.
    Errors: InputError where m says nothing about x_0 (epsilon at alpha = 0).
    """
    c1 = target(prediction, alpha, sigma, sigma_data)[1]
    determinant = _determinant(prediction, alpha, sigma, sigma_data)
    return Linear(state_scale * c1 / determinant, -sigma / determinant)


def noise(prediction: str, alpha: float, sigma: float, *, state_scale: float = 1.0, sigma_data: float = 0.5) -> Linear:
    """epsilon = (alpha m - c0 x) / (alpha c1 - sigma c0), for a state y with x = state_scale * y."""
    c0 = target(prediction, alpha, sigma, sigma_data)[0]
    determinant = _determinant(prediction, alpha, sigma, sigma_data)
    return Linear(-state_scale * c0 / determinant, alpha / determinant)


def _determinant(prediction: str, alpha: float, sigma: float, sigma_data: float) -> float:
    c0, c1 = target(prediction, alpha, sigma, sigma_data)
    determinant = alpha * c1 - sigma * c0
    if determinant == 0.0:
        raise InputError(
            f"prediction: {prediction!r} at alpha={alpha:g}, sigma={sigma:g} does not determine the data; "
            "use another prediction, or a schedule that keeps some signal"
        )
    return determinant
