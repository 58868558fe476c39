"""Stochastic methods leave the mixture's own distribution: moments and a two-sample Kolmogorov-Smirnov test."""

import pytest
from stochastic import assert_distribution, assert_power

from fastdiff import samplers

CASES = {
    "ddpm": {},
    "ddpm-large": {"variance": "fixed_large"},
    "ddim-half": {"eta": 0.5},
    "euler_ancestral": {},
    "euler_ancestral-half": {"eta": 0.5},
    "dpmpp_2m_sde": {},
    "dpmpp_2m_sde-heun": {"solver": "heun", "eta": 0.7},
}


@pytest.mark.parametrize("case", CASES)
def test_distribution_of_stochastic_methods(case):
    method = case.split("-")[0]
    assert samplers.methods()[method].stochastic or "eta" in CASES[case]
    assert_distribution(method, **CASES[case])


@pytest.mark.parametrize("case", ["ddpm", "ddim-half", "euler_ancestral", "dpmpp_2m_sde"])
def test_a_wrong_noise_coefficient_is_seen(case):
    assert_power(case.split("-")[0], **CASES[case])
