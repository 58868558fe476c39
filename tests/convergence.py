"""How fast a deterministic method approaches the exact flow of the Gaussian mixture, in float64."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from interpret import solve
from mixture import Mixture

from fastdiff import samplers
from fastdiff.ops.row import KNOWN
from fastdiff.samplers import StepTable
from fastdiff.schedules import Schedule

QUANTILES = np.linspace(0.02, 0.98, 25)
STEPS = (160, 320, 640)


def start_of(table: StepTable) -> np.ndarray:
    """The exact quantiles at the table's first point, as the state holds them."""
    alpha, sigma = table.grid.alphas[0], table.grid.sigmas[0]
    return Mixture().quantile(QUANTILES, alpha, sigma) * (table.init_level[1] / sigma)


def distance(table: StepTable, schedule: Schedule) -> float:
    """Root mean square distance of the method's result from the exact quantiles at the table's last point."""
    mixture = Mixture()
    signal = table.rows[-1, KNOWN][0]
    end = solve(mixture.denoiser(schedule, table.prediction), table, start_of(table))
    alpha, sigma = table.grid.alphas[-1], table.grid.sigmas[-1]
    return float(np.sqrt(np.mean((end * (alpha / signal) - mixture.quantile(QUANTILES, alpha, sigma)) ** 2)))


def error(
    method: str, schedule: Schedule, prediction: str, steps: int, spacing: str = "karras", **options: Any
) -> float:
    """`distance` between two levels that both have noise left."""
    ends = {"sigma_min": 0.05, "sigma_max": 0.95 if schedule.kind == "flow" else 50.0}
    options = {"spacing": spacing, "final_sigma": "schedule", **ends, **options}
    return distance(samplers.build(method, schedule=schedule, steps=steps, prediction=prediction, **options), schedule)


def graded_levels(steps: int, low: float = 0.05, high: float = 50.0) -> list[float]:
    """Levels even in r^(1/7), the first step split into 15 that double: a start at low order leaves no error there."""
    ramp = np.linspace(0.0, 1.0, steps + 1)
    levels = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    first = high - (high - levels[1]) * 2.0 ** -np.arange(14, 0, -1)
    return [high, *first.tolist(), *levels[1:].tolist()]


def assert_graded_order(order: int, /, method: str, schedule: Schedule, prediction: str, **options: Any) -> None:
    """`assert_order` on `graded_levels`."""
    errors = []
    for steps in (320, 640, 1280):
        given = {"sigmas": graded_levels(steps), "final_sigma": "last", **options}
        errors.append(distance(samplers.build(method, schedule=schedule, prediction=prediction, **given), schedule))
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    assert slopes[-1] == pytest.approx(order, abs=0.06), f"slopes {slopes}, errors {errors}"


def assert_order(
    order: int,
    method: str,
    schedule: Schedule,
    prediction: str,
    /,
    spacing: str = "karras",
    step_counts: tuple[int, int, int] = STEPS,
    **options: Any,
) -> None:
    """The slope between two step counts tends to the order like 1/steps: its own changes bound what is left."""
    assert_slopes(order, [error(method, schedule, prediction, steps, spacing, **options) for steps in step_counts])


def assert_slopes(order: int, found: Sequence[float]) -> None:
    """The same for errors whose step counts double."""
    errors = np.array(found)
    slopes = np.log2(errors[:-1] / errors[1:])
    assert slopes[-1] == pytest.approx(order, abs=0.06), f"slopes {slopes}, errors {errors}"
    assert abs(slopes[-1] - order) < abs(slopes[0] - order) + 1e-3, f"slopes {slopes}, errors {errors}"
