"""Noise schedules against their formulas and against diffusers' arrays."""

import json
import math

import numpy as np
import pytest

from fastdiff import schedules
from fastdiff.errors import InputError

VP = {
    "linear": (schedules.linear, "linear", {"beta_start": 1e-4, "beta_end": 0.02}),
    "scaled_linear": (schedules.scaled_linear, "scaled_linear", {"beta_start": 0.00085, "beta_end": 0.012}),
    "cosine": (schedules.cosine, "squaredcos_cap_v2", {}),
}
ALL = [schedules.linear(1000), schedules.scaled_linear(100), schedules.cosine(1000), schedules.flow(1000, shift=3.0)]


def formula(name: str, t: int, steps: int) -> float:
    """alpha_t^2 by plain products, one factor at a time."""
    product = 1.0
    for s in range(t + 1):
        if name == "linear":
            beta = 1e-4 + (0.02 - 1e-4) * s / (steps - 1)
        elif name == "scaled_linear":
            beta = (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * s / (steps - 1)) ** 2
        else:
            f = [math.cos((u / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (s, s + 1)]
            beta = min(1 - f[1] / f[0], 0.999)
        product *= 1 - beta
    return product


@pytest.mark.parametrize("name", VP)
@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
def test_vp_schedule_is_its_formula(name, t):
    schedule = VP[name][0](1000)
    expected = formula(name, t, 1000)
    assert schedule.alphas[t] ** 2 == pytest.approx(expected, rel=1e-11)
    assert schedule.sigmas[t] ** 2 == pytest.approx(1 - expected, rel=1e-11)


@pytest.mark.parametrize("name", VP)
def test_vp_schedule_is_that_of_diffusers(name):
    from diffusers import DDPMScheduler

    build, theirs, betas = VP[name]
    peer = DDPMScheduler(1000, beta_schedule=theirs, **betas).alphas_cumprod.double().numpy()
    # Theirs is a float32 product of up to 1000 factors 1 - beta, each rounded by up to 2^-25.
    np.testing.assert_allclose(build(1000).alphas ** 2, peer, rtol=1000 * 2**-25)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_schedule_is_its_formula(shift):
    schedule = schedules.flow(1000, shift=shift)
    for k in (0, 499, 999):
        u = (k + 1) / 1000
        t = shift * u / (1 + (shift - 1) * u)
        assert schedule.sigmas[k] == pytest.approx(t, rel=1e-14)
        assert schedule.alphas[k] == pytest.approx(1 - t, abs=1e-15)
        assert schedule.timesteps[k] == pytest.approx(1000 * t, rel=1e-14)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_config_survives_json(schedule):
    again = schedules.from_config(json.loads(json.dumps(schedule.to_config())))
    assert again.kind == schedule.kind
    assert np.array_equal(again.alphas, schedule.alphas)
    assert np.array_equal(again.sigmas, schedule.sigmas)


def test_custom_schedule_keeps_its_values():
    source = schedules.cosine(50)
    again = schedules.from_config(schedules.custom(source.alphas**2).to_config())
    np.testing.assert_allclose(again.alphas, source.alphas, rtol=1e-15)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_at_a_training_timestep_nothing_is_interpolated(schedule):
    alpha, sigma = schedule.at(schedule.timesteps)
    np.testing.assert_allclose(alpha, schedule.alphas, rtol=1e-11, atol=1e-15)
    np.testing.assert_allclose(sigma, schedule.sigmas, rtol=1e-11)


@pytest.mark.parametrize(
    ("interpolation", "mean"), [("log", lambda a, b: math.sqrt(a * b)), ("linear", lambda a, b: (a + b) / 2)]
)
def test_between_training_timesteps(interpolation, mean):
    schedule = schedules.linear(1000)
    alpha, sigma = schedule.at(10.5, interpolation=interpolation)
    assert sigma / alpha == pytest.approx(mean(schedule.noise_ratios[10], schedule.noise_ratios[11]), rel=1e-12)
    assert alpha**2 + sigma**2 == pytest.approx(1.0, rel=1e-15)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_timestep_of_inverts_at(schedule):
    t = np.linspace(schedule.timesteps[0], schedule.timesteps[-2], 37)
    alpha, sigma = schedule.at(t)
    np.testing.assert_allclose(schedule.timestep_of(sigma / alpha), t, rtol=1e-9, atol=1e-9)


def test_arrays_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        schedules.linear(10).alphas[0] = 2.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "cosin", "steps": 10}, "did you mean 'cosine'"),
        ({"steps": 10}, "expected a name"),
        ({"name": "linear", "steps": 1}, "at least 2"),
        ({"name": "linear", "steps": True}, "at least 2"),
        ({"name": "linear", "steps": 10, "beta_end": 1.5}, "beta_end: expected a number between 0 and 1"),
        ({"name": "cosine", "steps": 10, "beta_end": 0.5}, "do not fit it"),
        ({"name": "flow", "steps": 10, "shift": -1.0}, "shift: expected a positive number"),
        ({"name": "custom", "alphas_cumprod": [0.5, 0.6]}, "falling values"),
    ],
)
def test_bad_configurations_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        schedules.from_config(config)
