"""k-diffusion's midpoint methods; dpm2 with churn is in test_churn.py."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from convergence import assert_order
from diffusers_peer import assert_parity, scheduler_for, table_for
from interpret import trajectory
from k_diffusion_steps import SCHEDULE as VE
from k_diffusion_steps import assert_parity as assert_k_parity
from mixture import Mixture
from stochastic import assert_distribution, assert_power

from fastdiff import samplers, schedules
from fastdiff.errors import InputError

VP, FLOW, MIXTURE = schedules.linear(1000), schedules.flow(1000, shift=2.0), Mixture()


def ancestral(levels, y, z, eta, s_noise):
    """The states before each network call but the first, and the result, from the levels sigma / alpha."""
    states = []

    def slope(y, r):
        states.append(y)
        return (y - MIXTURE.denoise(y, 1.0, r)) / r

    for i, (r, r1) in enumerate(pairwise(levels)):
        up = min(r1, eta * math.sqrt(r1**2 * (r**2 - r1**2) / r**2))
        down = r1 * math.sqrt(1 - eta**2 + (eta * r1 / r) ** 2)
        d = slope(y, r)
        if down == 0.0:
            y = y - r * d
        else:
            middle = math.sqrt(r) * math.sqrt(down)
            y = y + (down - r) * slope(y + (middle - r) * d, middle) + s_noise * up * z[i]
    return [*states[1:], y]


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_ancestral_against_a_loop(eta, steps):
    generator = np.random.default_rng(0)
    table = samplers.build("dpm2_ancestral", schedule=VP, steps=steps, prediction="v", eta=eta, s_noise=1.1)
    levels, z = table.grid.noise_ratios, generator.standard_normal((steps, 30))
    y = levels[0] * generator.standard_normal(30)
    found = trajectory(MIXTURE.denoiser(VP, "v"), table, y, lambda index: z[index // 2])
    for ours, right in zip(found, ancestral(levels, y, z, eta, 1.1), strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-9, atol=1e-9)


def test_ancestral_without_noise_is_dpm2():
    options = {"schedule": VP, "steps": 9, "prediction": "v"}
    ode, sde = samplers.build("dpm2", **options), samplers.build("dpm2_ancestral", **options, eta=0.0)
    np.testing.assert_allclose(ode.rows, sde.rows, rtol=1e-12)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(VP, "v"), (VP, "sample"), (FLOW, "flow"), (VE, "epsilon")],
    ids=["v", "x", "flow", "ve"],
)
def test_order_of_convergence(schedule, prediction, spacing):
    assert_order(2, "dpm2", schedule, prediction, spacing)
    assert samplers.methods()["dpm2"].order == 2


@pytest.mark.parametrize("options", [{}, {"eta": 0.5}], ids=str)
def test_distribution(options):
    assert_distribution("dpm2_ancestral", **options)


def test_a_wrong_noise_coefficient_is_seen():
    assert_power("dpm2_ancestral")


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(
    ("schedule", "config", "options"),
    [
        ("linear", {}, {}),
        ("scaled_linear", {}, {}),
        ("scaled_linear", {"timestep_spacing": "trailing"}, {"spacing": "trailing", "integer": True}),
        (
            "scaled_linear",
            {"timestep_spacing": "leading", "steps_offset": 1},
            {"spacing": "leading", "integer": True, "steps_offset": 1, "initial": "unit"},
        ),
        (
            "cosine",
            {"use_exponential_sigmas": True},
            {"spacing": "exponential", "interpolation": None, "integer": None},
        ),
    ],
    ids=str,
)
def test_diffusers_dpm2(schedule, config, options, prediction):
    """Their classes have no sample prediction."""
    for steps in (2, 7, 20):
        scheduler = scheduler_for("dpm2", schedule, prediction, **config)
        if "use_exponential_sigmas" in config:
            options = {**options, "sigma_max": float(scheduler.sigmas.max())}
        assert_parity(table_for("dpm2", scheduler, prediction, steps, **options), scheduler)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_diffusers_dpm2_ancestral(schedule, prediction):
    for steps in (20, 50):
        scheduler = scheduler_for("dpm2_ancestral", schedule, prediction)
        assert_parity(table_for("dpm2_ancestral", scheduler, prediction, steps), scheduler)


def test_diffusers_ancestral_levels_are_no_numbers_in_few_steps():
    """Theirs subtracts nearly equal squares in float32: with two steps even the timesteps are not finite."""
    scheduler = scheduler_for("dpm2_ancestral", "linear", "v")
    scheduler.set_timesteps(2)
    assert not torch.isfinite(scheduler.timesteps).all()
    table = table_for("dpm2_ancestral", scheduler, "v", 2)
    assert np.isfinite(table.timesteps).all()


def test_k_diffusion():
    grid = samplers.build("euler", schedule=VE, steps=12, prediction="sample", spacing="karras").grid
    sigmas = torch.from_numpy(grid.sigmas).float()
    assert_k_parity("dpm2", "dpm_2", sigmas)
    for eta in (0.0, 0.7, 1.0):
        their = {"noise_sampler": True, "eta": eta, "s_noise": 1.1}
        assert_k_parity("dpm2_ancestral", "dpm_2_ancestral", sigmas, their=their, eta=eta, s_noise=1.1)


def test_no_signal_at_the_start_is_refused():
    with pytest.raises(InputError, match="keeps no signal at its first timestep"):
        samplers.build("dpm2", schedule=FLOW, steps=5, prediction="flow", spacing="flow")
