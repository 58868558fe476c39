"""Noise schedules against diffusers' arrays."""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from fastdiff import schedules

VP = {
    "linear": (schedules.linear, "linear", {"beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (schedules.scaled_linear, "scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
    "cosine": (schedules.cosine, "squaredcos_cap_v2", {}),
    "sigmoid": (schedules.sigmoid, "sigmoid", {"beta_start": 1e-4, "beta_end": 0.02}),
    "laplace": (schedules.laplace, "laplace", {}),
}


@pytest.mark.parametrize("name", VP)
def test_vp_schedule_is_that_of_diffusers(name):
    build, theirs, betas = VP[name]
    peer = diffusers.DDPMScheduler(1000, beta_schedule=theirs, **betas).alphas_cumprod.double().numpy()
    # Theirs is a float32 product of up to 1000 factors 1 - beta, each rounded by up to 2^-25.
    np.testing.assert_allclose(build(1000).alphas ** 2, peer, rtol=1000 * 2**-25)


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_zero_terminal_snr_is_that_of_diffusers(name):
    plain = VP[name][0](1000)
    alpha2 = np.append(1.0, plain.alphas**2)
    betas = rescale_zero_terminal_snr(torch.from_numpy(1.0 - alpha2[1:] / alpha2[:-1]))
    theirs = torch.cumprod(1.0 - betas, 0).numpy()
    ours = schedules.zero_terminal_snr(plain)
    np.testing.assert_allclose(ours.alphas**2, theirs, rtol=1e-9, atol=1e-15)
    assert (ours.alphas[0], ours.sigmas[0]) == pytest.approx((plain.alphas[0], plain.sigmas[0]), rel=1e-14)


def test_crash_is_the_schedule_of_ipndm():
    scheduler = diffusers.IPNDMScheduler(1000)
    ours = schedules.crash(1000)
    np.testing.assert_allclose(ours.sigmas[::-1], scheduler.betas[:-1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours.timesteps[::-1], scheduler.timesteps, rtol=1e-5, atol=1e-6)


def test_ve_has_the_levels_of_diffusers():
    scheduler = diffusers.ScoreSdeVeScheduler(1000, sigma_max=50.0)
    np.testing.assert_allclose(schedules.ve(1000).sigmas, scheduler.discrete_sigmas, rtol=1e-5)


@pytest.mark.parametrize("tokens", [256, 1024, 4096, 6144])
def test_dynamic_shift_is_that_of_diffusers(tokens):
    # FLUX.1's line: mu = 0.5 at 256 tokens and 1.15 at 4096.
    mu = 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
    shift = schedules.dynamic_shift(tokens)
    assert shift == pytest.approx(math.exp(mu), rel=1e-14)
    u = torch.linspace(0.01, 1.0, 20, dtype=torch.float64)
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).time_shift(mu, 1.0, u)
    np.testing.assert_allclose(schedules.shift_time(u.numpy(), shift), theirs, rtol=1e-14)
