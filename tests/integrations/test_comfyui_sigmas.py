"""ComfyUI's schedules against their formulas."""

import math

import numpy as np
import pytest
import torch
from comfyui_peer import EPS, Flow
from scipy.special import betaincinv

from fastdiff.errors import InputError
from fastdiff.integrations.k_diffusion import comfyui
from fastdiff.integrations.k_diffusion.comfyui import SCHEDULER_NAMES, calculate_sigmas

NAMES = [
    *("simple", "sgm_uniform", "karras", "exponential", "ddim_uniform", "beta", "normal"),
    *("linear_quadratic", "kl_optimal"),
]
SAMPLINGS = {"eps": EPS(), "flow": Flow()}


class FromZero(EPS):
    """Whose lowest levels are 0."""

    low = 0.0
    sigmas = torch.cat([torch.zeros(2), torch.linspace(0.1, 14.6, 998)])
    sigma_min, sigma_max = sigmas[0], sigmas[-1]


def formula(name: str, sampling: EPS | Flow, n: int) -> np.ndarray:
    known = sampling.sigmas.double().numpy()
    low, high, ramp = known[0], known[-1], np.arange(n) / max(n - 1, 1)
    if name == "simple":
        found = [known[len(known) - 1 - math.floor(i * len(known) / n)] for i in range(n)]
    elif name in ("normal", "sgm_uniform"):
        first, last = (float(sampling.timestep(torch.tensor(end))) for end in (high, low))
        share = ramp if name == "normal" else np.arange(n) / n
        found = [float(sampling.sigma(torch.tensor(t))) for t in first + share * (last - first)]
    elif name == "karras":
        found = (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7
    elif name == "exponential":
        found = high * (low / high) ** ramp
    elif name == "ddim_uniform":
        found = known[1 :: len(known) // n][::-1]
    elif name == "beta":
        indices = np.rint(betaincinv(0.6, 0.6, 1.0 - np.arange(n) / n) * (len(known) - 1)).astype(int)
        found = known[indices]
    elif name == "kl_optimal":
        found = np.tan(ramp * math.atan(low) + (1.0 - ramp) * math.atan(high))
    else:
        # A line to 0.025 in half of the steps, and the parabola of the same slope to 1.
        half = n // 2
        slope, rest = 0.025 / half, n - half
        j = np.arange(rest)
        bend = (1.0 - 0.025 - slope * rest) / rest**2
        found = high * (1.0 - np.concatenate([slope * np.arange(half), 0.025 + slope * j + bend * j**2]))
    return np.append(found, 0.0)


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("name", NAMES)
def test_levels(name, steps, kind):
    found = calculate_sigmas(SAMPLINGS[kind], name, steps)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx(formula(name, SAMPLINGS[kind], steps).tolist(), rel=2e-5)


def test_names():
    assert list(SCHEDULER_NAMES) == NAMES
    with pytest.raises(InputError, match=r"scheduler_name: expected one of simple, .*got 'linear'"):
        calculate_sigmas(SAMPLINGS["eps"], "linear", 5)


def test_a_lowest_level_of_zero_is_the_last():
    for name in ("normal", "ddim_uniform"):
        levels = calculate_sigmas(FromZero(), name, 5)
        assert levels[-1] == 0.0
        assert levels[-2] > 0.0
        assert len(levels) >= 6


def test_one_step_of_linear_quadratic():
    assert calculate_sigmas(SAMPLINGS["eps"], "linear_quadratic", 1).tolist() == pytest.approx([14.6, 0.0])


def test_levels_are_taken_once_by_beta():
    levels = comfyui.beta_scheduler(SAMPLINGS["eps"], 600).tolist()
    assert len(set(levels)) == len(levels) < 601
