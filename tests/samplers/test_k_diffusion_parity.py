"""Euler, Heun and their like against k-diffusion's samplers at every call of the network, float32, 1e-5."""

import pytest
import torch
from k_diffusion_peer import load
from k_diffusion_steps import assert_parity

CASES = {
    "euler": ("euler", {}, {}),
    "heun": ("heun", {}, {}),
    "dpm2": ("dpm_2", {}, {}),
    "euler_ancestral": ("euler_ancestral", {"noise_sampler": True}, {}),
    "euler_ancestral-eta": (
        "euler_ancestral",
        {"noise_sampler": True, "eta": 0.6, "s_noise": 1.1},
        {"eta": 0.6, "s_noise": 1.1},
    ),
    "euler_ancestral-plain": ("euler_ancestral", {"noise_sampler": True, "eta": 0.0}, {"eta": 0.0}),
}


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("case", CASES)
def test_every_state(case, steps):
    name, their, options = CASES[case]
    # A step of theirs over two orders of magnitude subtracts nearly equal numbers: x + d (sigma' - sigma).
    low = max(0.1, 20.0 / 4.0**steps)
    sigmas = load().sampling.get_sigmas_karras(steps, low, 20.0) if steps > 1 else torch.tensor([20.0, 0.0])
    assert_parity(case.split("-")[0], name, sigmas, their=their, **options)
