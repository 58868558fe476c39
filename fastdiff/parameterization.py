"""What a network predicts, as linear coefficients: m = c0 x_0 + c1 epsilon, with x = alpha x_0 + sigma epsilon.

Solving the two equations for x_0 and epsilon gives every conversion between predictions.
"""

import difflib
import math
from dataclasses import dataclass

from fastdiff.errors import InputError
from fastdiff.schedules import KINDS, Schedule

_NOISING = ("vp", "ve", "sub_vp")
SCHEDULE_KINDS = {
    "epsilon": _NOISING,
    "v": ("vp",),
    "sample": KINDS,
    "flow": ("flow",),
    "score": _NOISING,
    "edm": ("ve",),
}
PREDICTIONS = tuple(SCHEDULE_KINDS)


@dataclass(frozen=True)
class Linear:
    """x_coefficient * x + m_coefficient * m."""

    x: float
    m: float


def check(prediction: str, schedule: Schedule) -> None:
    """InputError unless a network trained on this schedule can make this prediction."""
    if not isinstance(prediction, str) or prediction not in SCHEDULE_KINDS:
        near = difflib.get_close_matches(str(prediction), PREDICTIONS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"prediction: expected one of {', '.join(PREDICTIONS)}, got {prediction!r}{hint}")
    fitting = [name for name in PREDICTIONS if _fits(name, schedule)]
    if prediction not in fitting:
        raise InputError(
            f"prediction: {prediction!r} does not fit the {schedule.kind} schedule {schedule.name!r}; "
            f"expected one of {', '.join(fitting)}"
        )


def _fits(prediction: str, schedule: Schedule) -> bool:
    return schedule.kind in SCHEDULE_KINDS[prediction] and (prediction != "edm" or schedule.name == "edm")


def target(prediction: str, alpha: float, sigma: float, sigma_data: float = 0.5) -> tuple[float, float]:
    """(c0, c1) of what the network is trained to give, m = c0 x_0 + c1 epsilon.

    epsilon (0, 1); sample (1, 0); v (-sigma, alpha), Salimans and Ho 2022; flow (-1, 1) = dx/dt of x = (1-t) x_0 + t
    epsilon, Lipman et al. 2023; score (0, -1/sigma), Song et al. 2021; edm (sigma/sigma_data, -sigma_data) / h with
    h^2 = sigma^2 + sigma_data^2, which is F in x_0 = c_skip x + c_out F, alpha = 1, Karras et al. 2022, table 1.
    """
    if prediction == "score":
        if sigma == 0.0:
            raise InputError("prediction: 'score' at sigma=0 is not defined; end the steps before sigma=0")
        return 0.0, -1.0 / sigma
    if prediction == "edm":
        root = math.hypot(sigma, sigma_data)
        return sigma / (sigma_data * root), -sigma_data / root
    coefficients = {"epsilon": (0.0, 1.0), "sample": (1.0, 0.0), "v": (-sigma, alpha), "flow": (-1.0, 1.0)}
    if prediction not in coefficients:
        raise InputError(f"prediction: expected one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    return coefficients[prediction]


def input_scale(prediction: str, alpha: float, sigma: float, sigma_data: float = 0.5) -> float:
    """What x = alpha x_0 + sigma epsilon is multiplied by before the network is given it.

    1, but for edm c_in = 1 / sqrt(sigma^2 + sigma_data^2), Karras et al. 2022, table 1.
    """
    return 1.0 / math.hypot(sigma, sigma_data) if prediction == "edm" else 1.0


def data(prediction: str, alpha: float, sigma: float, *, state_scale: float = 1.0, sigma_data: float = 0.5) -> Linear:
    """x_0 = (c1 x - sigma m) / (alpha c1 - sigma c0), for a state y with x = state_scale * y.

    state_scale = alpha is the space of Karras et al. 2022, in which y = x_0 + (sigma / alpha) epsilon. sigma_data is
    the schedule's, which only the prediction "edm" depends on.
    Errors: InputError where m says nothing about x_0 (epsilon and score at alpha = 0).
    """
    c0, c1 = target(prediction, alpha, sigma, sigma_data)
    determinant = _determinant(prediction, alpha, sigma, c0, c1)
    return Linear(state_scale * c1 / determinant, -sigma / determinant)


def noise(prediction: str, alpha: float, sigma: float, *, state_scale: float = 1.0, sigma_data: float = 0.5) -> Linear:
    """epsilon = (alpha m - c0 x) / (alpha c1 - sigma c0), for a state y with x = state_scale * y."""
    c0, c1 = target(prediction, alpha, sigma, sigma_data)
    determinant = _determinant(prediction, alpha, sigma, c0, c1)
    return Linear(-state_scale * c0 / determinant, alpha / determinant)


def _determinant(prediction: str, alpha: float, sigma: float, c0: float, c1: float) -> float:
    determinant = alpha * c1 - sigma * c0
    if determinant == 0.0:
        raise InputError(
            f"prediction: {prediction!r} at alpha={alpha:g}, sigma={sigma:g} does not determine the data; "
            "use another prediction, or a schedule that keeps some signal"
        )
    return determinant
