"""Grids beside those of diffusers and k-diffusion: noise levels, and what the network is told."""

import diffusers
import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_utils import AysSchedules
from k_diffusion_peer import load

from fastdiff import schedules
from fastdiff.samplers import Grid, grid
from fastdiff.samplers.grid import GridOptions

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = [1, 2, 7, 10, 33]
# diffusers works in float32: one rounding of the level, and those of the end that it starts from.
FLOAT32 = {"rtol": 2e-6, "atol": 1e-7}


def build(schedule: schedules.Schedule, steps: int | None = None, **options) -> Grid:
    return grid.build(schedule, steps, GridOptions(**options))


def latent(scheduler) -> schedules.Schedule:
    return schedules.custom(scheduler.alphas_cumprod.double().numpy())


@pytest.fixture
def _double():
    """k-diffusion follows PyTorch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("steps", STEPS[1:])  # with one step this class starts from the clean end
@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_levels_are_those_of_diffusers(spacing, steps, final):
    scheduler = diffusers.EulerDiscreteScheduler(**LATENT, **{f"use_{spacing}_sigmas": True}, final_sigmas_type=final)
    scheduler.set_timesteps(steps)
    final_sigma = {"zero": "zero", "sigma_min": "schedule"}[final]
    points = build(latent(scheduler), steps, spacing=spacing, final_sigma=final_sigma, endpoint=True)
    np.testing.assert_allclose(points.noise_ratios, scheduler.sigmas, **FLOAT32)
    np.testing.assert_allclose(points.timesteps[:-1], scheduler.timesteps, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(("spacing", "flag"), [("karras", "use_karras_sigmas"), ("logsnr", "use_lu_lambdas")])
def test_whole_timesteps_are_those_of_diffusers(spacing, flag, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(**LATENT, **{flag: True})
    scheduler.set_timesteps(steps)
    points = build(latent(scheduler), steps, spacing=spacing, integer=True, final_sigma="zero")
    np.testing.assert_allclose(points.noise_ratios, scheduler.sigmas, **FLOAT32)
    assert points.timesteps[:-1].tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("model", ["sd15", "sdxl", "svd"])
def test_align_your_steps_is_that_of_diffusers(model):
    name = {"sd15": "StableDiffusion", "sdxl": "StableDiffusionXL", "svd": "StableDiffusionVideo"}[model]
    schedule = schedules.edm(sigma_max=1000.0) if model == "svd" else schedules.scaled_linear()
    points = build(schedule, 10, spacing="align_your_steps", ays_model=model)
    np.testing.assert_allclose(points.noise_ratios, AysSchedules[f"{name}Sigmas"], rtol=1e-14)
    if model != "svd":
        # The published timesteps are those of the levels before these were rounded to three digits.
        assert np.abs(points.timesteps[:-1] - AysSchedules[f"{name}Timesteps"]).max() < 1.5


def test_given_timesteps_are_those_of_diffusers():
    scheduler = diffusers.EulerDiscreteScheduler(**LATENT)
    scheduler.set_timesteps(timesteps=AysSchedules["StableDiffusionTimesteps"])
    points = build(latent(scheduler), timesteps=AysSchedules["StableDiffusionTimesteps"])
    np.testing.assert_allclose(points.noise_ratios, scheduler.sigmas, **FLOAT32)
    assert points.timesteps[:-1].tolist() == scheduler.timesteps.tolist()


def test_given_levels_are_those_of_diffusers():
    scheduler = diffusers.EulerDiscreteScheduler(**LATENT)
    levels = AysSchedules["StableDiffusionXLSigmas"]
    scheduler.set_timesteps(sigmas=levels)
    points = build(latent(scheduler), sigmas=levels)
    np.testing.assert_allclose(points.noise_ratios, scheduler.sigmas, **FLOAT32)
    np.testing.assert_allclose(points.timesteps[:-1], scheduler.timesteps, rtol=1e-5, atol=2e-3)


@pytest.mark.parametrize("steps", [2, 7, 28])
@pytest.mark.parametrize("spacing", ["flow", "karras", "exponential", "beta"])
@pytest.mark.parametrize("shift", [1.0, 3.0, "dynamic"])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_flow_levels_are_those_of_diffusers(steps, spacing, shift, terminal):
    mu = 0.83 if shift == "dynamic" else None
    flag = {} if spacing == "flow" else {f"use_{spacing}_sigmas": True}
    config = {"use_dynamic_shifting": True} if mu else {"shift": shift}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**config, **flag, shift_terminal=terminal)
    # Their converted ramps run between config.sigma_max and config.sigma_min, or the given levels' ends.
    u = np.linspace(1.0, 1.0 / steps, steps)
    scheduler.set_timesteps(sigmas=u, mu=mu)
    options = {"shift": np.exp(mu) if mu else shift, "shift_terminal": terminal}
    ends = {} if spacing == "flow" else {"sigma_min": 1.0 / steps}
    points = build(schedules.flow(), steps, spacing=spacing, **options, **ends)
    np.testing.assert_allclose(points.sigmas, scheduler.sigmas, **FLOAT32)
    np.testing.assert_allclose(points.timesteps[:-1], scheduler.timesteps, rtol=2e-6)
    assert points.timesteps[-1] == 0.0


@pytest.mark.parametrize("steps", [2, 7, 28])
def test_given_flow_levels_are_shifted_on_request(steps):
    u = np.linspace(1.0, 1.0 / steps, steps)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=u)
    np.testing.assert_allclose(build(schedules.flow(), sigmas=u, shift=3.0).sigmas, scheduler.sigmas, **FLOAT32)
    assert build(schedules.flow(shift=3.0), sigmas=u).sigmas[:-1].tolist() == u.tolist()


@pytest.mark.parametrize("steps", STEPS[1:])  # with one exponential step this class starts from the clean end
@pytest.mark.parametrize("spacing", ["karras", "exponential"])
def test_edm_levels_are_those_of_diffusers(spacing, steps):
    scheduler = diffusers.EDMEulerScheduler(sigma_schedule=spacing)
    scheduler.set_timesteps(steps)
    points = build(schedules.edm(), steps, spacing=spacing)
    np.testing.assert_allclose(points.noise_ratios, scheduler.sigmas, **FLOAT32)
    np.testing.assert_allclose(points.timesteps[:-1], scheduler.timesteps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("steps", STEPS)
def test_crash_levels_are_those_of_ipndm(steps):
    scheduler = diffusers.IPNDMScheduler(1000)
    scheduler.set_timesteps(steps)
    points = build(schedules.crash(), steps)
    np.testing.assert_allclose(points.sigmas, scheduler.betas, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(points.alphas, scheduler.alphas, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(points.timesteps[:-1], scheduler.timesteps, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.75, 0.8, 1.0])
@pytest.mark.parametrize("steps", [10, 30, 50])
def test_strength_keeps_the_steps_of_diffusers(steps, strength):
    scheduler = diffusers.EulerDiscreteScheduler(**LATENT, use_karras_sigmas=True)
    scheduler.set_timesteps(steps)
    # What its image-to-image pipelines do.
    first = max(steps - min(int(steps * strength), steps), 0)
    points = build(latent(scheduler), steps, spacing="karras", strength=strength)
    np.testing.assert_allclose(points.noise_ratios, scheduler.sigmas[first:], **FLOAT32)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize(
    ("spacing", "options"),
    [
        ("karras", {}),
        ("karras", {"rho": 3.0}),
        ("exponential", {}),
        ("polyexponential", {}),
        ("polyexponential", {"rho": 0.5}),
    ],
    ids=str,
)
def test_levels_are_those_of_k_diffusion(spacing, options, steps):
    theirs = getattr(load().sampling, f"get_sigmas_{spacing}")(steps, 0.03, 14.6, **options)
    ends = {"sigma_min": 0.03, "sigma_max": 14.6}
    for schedule in (schedules.scaled_linear(), schedules.edm()):
        points = build(schedule, steps, spacing=spacing, **ends, **options)
        np.testing.assert_allclose(points.noise_ratios, theirs, rtol=1e-11)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("steps", STEPS)
def test_vp_sde_levels_are_those_of_k_diffusion(steps):
    theirs = load().sampling.get_sigmas_vp(steps)
    points = build(schedules.vp_sde(), steps, spacing="linspace")
    np.testing.assert_allclose(points.noise_ratios, theirs, rtol=1e-10)


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("steps", [2, 7, 10, 33])
def test_timesteps_and_levels_of_a_discrete_schedule_are_those_of_k_diffusion(steps):
    schedule = schedules.scaled_linear()
    peer = load().external.DiscreteSchedule(torch.from_numpy(schedule.noise_ratios.copy()), quantize=False)
    points = build(schedule, steps, spacing="linspace", integer=False)
    np.testing.assert_allclose(points.noise_ratios, peer.get_sigmas(steps), rtol=1e-10)
    levels = np.geomspace(0.03, 14.0, 29)
    np.testing.assert_allclose(schedule.timestep_of(levels), peer.sigma_to_t(torch.from_numpy(levels)), rtol=1e-10)
