"""Whether a stochastic method leaves the mixture's own distribution: moments and a two-sample test."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from interpret import solve
from mixture import Mixture

from fastdiff import samplers, schedules
from fastdiff.ops.row import INPUTS, NEW_ANCHOR, NEW_X
from fastdiff.samplers import StepTable
from fastdiff.schedules import Schedule

SCHEDULE = schedules.linear(1000)
STEPS, COUNT = 250, 8000
# Two samples of n differ by more than 1.95 sqrt(2/n) once in a thousand times.
KS_BOUND = 1.95 * np.sqrt(2.0 / COUNT)
# The variance's: four standard errors, and 12/steps for the discretisation, which is of first order.
VARIANCE_BOUND = 4.0 * np.sqrt(2.0 / COUNT) + 12.0 / STEPS


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    points = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def draw(method: str, *, noise_factor: float = 1.0, schedule: Schedule = SCHEDULE, **options: Any) -> np.ndarray:
    """COUNT results of the method, started in the exact marginal."""
    mixture, generator = Mixture(), np.random.default_rng(5)
    options = {"steps": STEPS, "prediction": "v", "spacing": "karras", **options}
    table = samplers.build(method, schedule=schedule, **options)
    rows = table.rows.copy()
    for block in (NEW_X, NEW_ANCHOR):
        rows[:, block.start + INPUTS.index("noise")] *= noise_factor
    start = mixture.sample(generator, COUNT, *table.init_level)
    return run(replace(table, rows=rows), start, lambda: generator.standard_normal(COUNT), schedule)


def run(table: StepTable, start: np.ndarray, normal: Callable[[], np.ndarray], schedule: Schedule) -> np.ndarray:
    return solve(Mixture().denoiser(schedule, table.prediction), table, start, lambda _: normal())


def figures(found: np.ndarray) -> tuple[float, float, float]:
    """Kolmogorov-Smirnov distance from the mixture; errors of the mean in standard errors and of the variance."""
    mixture = Mixture()
    mean, variance = mixture.moments()
    distance = kolmogorov_smirnov(found, mixture.sample(np.random.default_rng(6), COUNT))
    return distance, abs(found.mean() - mean) / np.sqrt(variance / COUNT), abs(found.var() / variance - 1.0)


def assert_distribution(method: str, **options: Any) -> None:
    distance, mean, variance = figures(draw(method, **options))
    assert distance < KS_BOUND
    assert mean < 4.0
    assert variance < VARIANCE_BOUND


def assert_power(method: str, **options: Any) -> None:
    """`assert_distribution` can fail: 25 % too little or too much noise fails it twice."""
    for factor in (0.75, 1.25):
        distance, _, variance = figures(draw(method, noise_factor=factor, **options))
        assert distance > KS_BOUND
        assert variance > VARIANCE_BOUND
