"""Stochastic methods leave the mixture's own distribution: moments and a two-sample Kolmogorov-Smirnov test."""

from dataclasses import replace

import numpy as np
import pytest
from interpret import solve
from mixture import Mixture

from fastdiff import samplers, schedules
from fastdiff.ops.row import INPUTS, NEW_X

SCHEDULE = schedules.linear(1000)
STEPS, COUNT = 250, 8000
CASES = {
    "ddpm": {},
    "ddpm-large": {"variance": "fixed_large"},
    "ddim-half": {"eta": 0.5},
    "euler_ancestral": {},
    "euler_ancestral-half": {"eta": 0.5},
    "dpmpp_2m_sde": {},
    "dpmpp_2m_sde-heun": {"solver": "heun", "eta": 0.7},
}
# Two samples of n differ by more than 1.95 sqrt(2/n) once in a thousand times.
KS_BOUND = 1.95 * np.sqrt(2.0 / COUNT)


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    points = np.concatenate([a, b])
    below = [np.searchsorted(np.sort(sample), points, side="right") / len(sample) for sample in (a, b)]
    return float(np.abs(below[0] - below[1]).max())


def draw(case: str, noise_factor: float = 1.0) -> np.ndarray:
    """COUNT results of the method, started in the exact marginal."""
    mixture, generator = Mixture(), np.random.default_rng(5)
    table = samplers.build(
        case.split("-")[0], schedule=SCHEDULE, steps=STEPS, prediction="v", spacing="karras", **CASES[case]
    )
    rows = table.rows.copy()
    rows[:, NEW_X.start + INPUTS.index("noise")] *= noise_factor
    alpha, sigma = table.grid.alphas[0], table.grid.sigmas[0]
    start = mixture.sample(generator, COUNT, alpha, sigma) / (alpha if table.first_input_scale != 1.0 else 1.0)
    broken = replace(table, rows=rows)
    return solve(mixture.denoiser(SCHEDULE, "v"), broken, start, lambda _: generator.standard_normal(COUNT))


@pytest.mark.parametrize("case", CASES)
def test_distribution_of_stochastic_methods(case):
    mixture = Mixture()
    mean, variance = mixture.moments()
    reference = mixture.sample(np.random.default_rng(6), COUNT)
    found = draw(case)
    assert samplers.methods()[case.split("-")[0]].stochastic or "eta" in CASES[case]
    assert kolmogorov_smirnov(found, reference) < KS_BOUND
    # Four standard errors, and for the variance 12/steps for the discretisation, which is of first order.
    assert abs(found.mean() - mean) < 4.0 * np.sqrt(variance / COUNT)
    assert abs(found.var() / variance - 1.0) < 4.0 * np.sqrt(2.0 / COUNT) + 12.0 / STEPS


@pytest.mark.parametrize("case", ["ddpm", "ddim-half", "euler_ancestral", "dpmpp_2m_sde"])
def test_a_wrong_noise_coefficient_is_seen(case):
    """The tests above have power: 25 % too little or too much noise fails both."""
    mixture = Mixture()
    reference = mixture.sample(np.random.default_rng(6), COUNT)
    for factor in (0.75, 1.25):
        found = draw(case, factor)
        assert kolmogorov_smirnov(found, reference) > KS_BOUND
        variance = mixture.moments()[1]
        assert abs(found.var() / variance - 1.0) > 4.0 * np.sqrt(2.0 / COUNT) + 12.0 / STEPS
