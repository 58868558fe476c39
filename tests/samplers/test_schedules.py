"""Noise schedules against their formulas."""

import json
import math

import numpy as np
import pytest
import torch

from fastdiff import schedules
from fastdiff.errors import InputError

ALL = [
    schedules.linear(1000),
    schedules.scaled_linear(100),
    schedules.cosine(1000),
    schedules.sigmoid(1000),
    schedules.laplace(1000),
    schedules.zero_terminal_snr(schedules.linear(1000)),
    schedules.flow(1000, shift=3.0),
    schedules.ve(1000),
    schedules.edm(1000, sigma_data=0.7),
    schedules.edm(1000, timestep_scale=1000.0),
    schedules.vp_sde(1000),
    schedules.sub_vp_sde(1000),
    schedules.crash(1000),
]
WITHOUT_SIGNAL = ("zero_terminal_snr", "flow", "crash")
IDENTITY = {
    "vp": lambda alpha, sigma: alpha**2 + sigma**2,
    "flow": lambda alpha, sigma: alpha + sigma,
    "ve": lambda alpha, sigma: alpha,
    "sub_vp": lambda alpha, sigma: sigma + alpha**2,
}
pytestmark = pytest.mark.filterwarnings("error:.*encountered:RuntimeWarning")


def laplace_alpha2(u: float) -> float:
    log_snr = math.copysign(0.5, u - 0.5) * math.log(1 - 2 * abs(u - 0.5) + 1e-6)
    return math.sqrt(1 / (1 + math.exp(-log_snr)))


def formula(name: str, t: int, steps: int) -> float:
    """alpha_t^2 by plain products, one factor at a time."""
    product = 1.0
    for s in range(t + 1):
        if name == "linear":
            beta = 1e-4 + (0.02 - 1e-4) * s / (steps - 1)
        elif name == "scaled_linear":
            beta = (math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * s / (steps - 1)) ** 2
        elif name == "sigmoid":
            beta = 1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * s / (steps - 1)))
        elif name == "laplace":
            f = [laplace_alpha2(u / steps) for u in (s, s + 1)]
            beta = min(1 - f[1] / f[0], 0.999)
        else:
            f = [math.cos((u / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (s, s + 1)]
            beta = min(1 - f[1] / f[0], 0.999)
        product *= 1 - beta
    return product


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine", "sigmoid", "laplace"])
@pytest.mark.parametrize("t", [0, 1, 500, 998, 999])
def test_vp_schedule_is_its_formula(name, t):
    schedule = schedules.from_config({"name": name})
    expected = formula(name, t, 1000)
    assert schedule.alphas[t] ** 2 == pytest.approx(expected, rel=1e-11)
    assert schedule.sigmas[t] ** 2 == pytest.approx(1 - expected, rel=1e-11)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_schedule_is_its_formula(shift):
    schedule = schedules.flow(1000, shift=shift)
    for k in (0, 499, 999):
        u = (k + 1) / 1000
        t = shift * u / (1 + (shift - 1) * u)
        assert schedule.sigmas[k] == pytest.approx(t, rel=1e-14)
        assert schedule.alphas[k] == pytest.approx(1 - t, abs=1e-15)
        assert schedule.timesteps[k] == pytest.approx(1000 * t, rel=1e-14)


def closed_form(name: str, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(alpha, sigma, network timestep) at time s, with the defaults of each builder."""
    one, integral = torch.ones_like(s), 0.1 * s + 19.9 * s**2 / 2
    if name == "flow":
        return 1 - s, s, 1000 * s
    if name == "ve":
        return one, 0.01 * 5000**s, 0.01 * 5000**s
    if name == "edm":
        return one, 0.002 * 40000**s, torch.log(0.002 * 40000**s) / 4
    if name == "vp_sde":
        return torch.exp(-integral / 2), torch.sqrt(1 - torch.exp(-integral)), 999 * s
    if name == "sub_vp_sde":
        return torch.exp(-integral / 2), 1 - torch.exp(-integral), 999 * s
    sigma = torch.sin(math.pi * s / 2) ** 2
    alpha = torch.sqrt(1 - sigma**2)
    return alpha, sigma, torch.atan2(sigma, alpha) * 2 / math.pi


@pytest.mark.parametrize("schedule", [s for s in ALL if s.continuous], ids=lambda s: s.name)
def test_continuous_schedule_is_its_formula(schedule):
    s = torch.linspace(0.05, 0.95, 19, dtype=torch.float64, requires_grad=True)
    alpha, sigma, t = closed_form(schedule.name, s)
    t = t * schedule.config.get("timestep_scale", 1.0)
    ours = schedule.at(t.detach().numpy())
    np.testing.assert_allclose(ours[0], alpha.detach(), rtol=1e-12)
    np.testing.assert_allclose(ours[1], sigma.detach(), rtol=1e-12)
    np.testing.assert_allclose(schedule.time(t.detach().numpy()), s.detach(), rtol=1e-12)
    # The drift and diffusion of Song et al. from the derivatives of the formulas.
    f = torch.autograd.grad(alpha.log().sum(), s, retain_graph=True)[0] if alpha.requires_grad else 0 * s
    growth = torch.autograd.grad((sigma**2).sum(), s)[0]
    drift, diffusion = schedule.drift_diffusion(t.detach().numpy())
    np.testing.assert_allclose(drift, f.detach(), rtol=1e-11)
    np.testing.assert_allclose(diffusion, (growth - 2 * f * sigma**2).detach(), rtol=1e-10)


@pytest.mark.parametrize("schedule", [s for s in ALL if s.continuous and s.kind != "flow"], ids=lambda s: s.name)
def test_continuous_schedule_is_sampled_evenly_in_time(schedule):
    start = {"vp_sde": 1e-3, "sub_vp_sde": 1e-3, "crash": 1e-3}.get(schedule.name, 0.0)
    np.testing.assert_allclose(schedule.time(schedule.timesteps), np.linspace(start, 1.0, 1000), rtol=1e-12, atol=1e-15)
    middle = schedule.timestep_at([0.0, 499.5, 999.0])
    np.testing.assert_allclose(schedule.time(middle), [start, (1 + start) / 2, 1.0], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("schedule", [s for s in ALL if not s.continuous], ids=lambda s: s.name)
def test_drift_of_a_discrete_schedule_is_its_interpolations(schedule):
    t = np.array([0.5, 10.25, schedule.steps / 2 + 0.5, schedule.steps - 2.25, schedule.steps - 1.5])
    h = 0.05
    # ln(sigma / alpha) is linear between two timesteps, ln(alpha / sigma)'s exponential before one without signal.
    low, high = (np.log(np.divide(*schedule.at(t + d)[::-1])) for d in (-h, h))
    slope = (high - low) / (2 * h) * schedule.steps
    if schedule.name == "zero_terminal_snr":
        slope[-1] = schedule.steps / 0.5
    f, g2 = schedule.drift_diffusion(t)
    sigma2 = schedule.at(t)[1] ** 2
    np.testing.assert_allclose(g2, 2 * sigma2 * slope, rtol=1e-9)
    np.testing.assert_allclose(f, -sigma2 * slope, rtol=1e-9)
    assert schedule.time(schedule.steps - 1) == 1.0


def test_drift_of_ddpm_tends_to_that_of_the_vp_sde():
    error = []
    for steps in (1000, 2000):
        fine = schedules.linear(steps, beta_start=0.1 / steps, beta_end=20.0 / steps)
        k = np.arange(steps // 10, steps, steps // 10)
        g2 = fine.drift_diffusion(k - 0.5)[1]
        error.append(np.abs(g2 / (0.1 + 19.9 * (k / steps)) - 1.0).max())
    assert error[0] < 0.02
    assert error[1] < 0.55 * error[0]


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_levels_rise_and_keep_their_kind(schedule):
    ratios = schedule.noise_ratios
    assert (ratios[1:] > ratios[:-1]).all()
    np.testing.assert_allclose(IDENTITY[schedule.kind](schedule.alphas, schedule.sigmas), 1.0, rtol=1e-13)
    alpha, sigma = schedule.from_ratio(ratios)
    np.testing.assert_allclose(alpha, schedule.alphas, rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(sigma, schedule.sigmas, rtol=1e-12)


@pytest.mark.parametrize("kind", schedules.KINDS)
def test_levels_of_ratios_without_end(kind):
    alpha, sigma = schedules.from_ratio(kind, [0.0, 1e-8, 1e8, np.inf])
    assert alpha[0] == 1.0
    assert sigma[0] == 0.0
    assert sigma[1] == pytest.approx(1e-8, rel=1e-7)
    assert (alpha[3], sigma[3]) == ((1.0, np.inf) if kind == "ve" else (0.0, 1.0))
    if kind != "ve":
        assert alpha[2] == pytest.approx(1e-8, rel=1e-7)


@pytest.mark.parametrize("schedule", [s for s in ALL if s.name in WITHOUT_SIGNAL], ids=lambda s: s.name)
def test_the_end_without_signal_is_exact(schedule):
    last = schedule.timesteps[-1]
    assert (schedule.alphas[-1], schedule.sigmas[-1]) == (0.0, 1.0)
    assert schedule.at(last) == (0.0, 1.0)
    assert schedule.noise_ratios[-1] == np.inf
    assert schedule.timestep_of(np.inf) == last
    assert schedule.drift_diffusion(last) == (-np.inf, np.inf)
    if schedule.kind == "vp":
        assert schedule.at(last, interpolation="linear") == (0.0, 1.0)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_ratios_beyond_the_ends_give_the_ends(schedule):
    clean = 0.0 if schedule.name in ("flow", "crash", "vp_sde", "sub_vp_sde") else schedule.timesteps[0]
    assert schedule.timestep_of(0.0) == pytest.approx(clean, rel=1e-14)
    if schedule.kind != "ve":
        assert schedule.timestep_of(np.inf) == pytest.approx(schedule.timesteps[-1], rel=1e-14)


def test_between_the_last_two_timesteps_of_a_schedule_without_signal():
    schedule = schedules.zero_terminal_snr(schedules.linear(1000))
    alpha, sigma = schedule.at([998.0, 998.25, 998.5])
    np.testing.assert_allclose(alpha / sigma, schedule.alphas[998] / schedule.sigmas[998] * np.array([1, 0.75, 0.5]))
    np.testing.assert_allclose(schedule.timestep_of(sigma / alpha), [998.0, 998.25, 998.5], rtol=1e-14)


@pytest.mark.parametrize("schedule", ALL, ids=lambda s: s.name)
def test_config_survives_json(schedule):
    again = schedules.from_config(json.loads(json.dumps(schedule.to_config())))
    assert again.kind == schedule.kind
    assert np.array_equal(again.alphas, schedule.alphas)
    assert np.array_equal(again.sigmas, schedule.sigmas)
    assert np.array_equal(again.timesteps, schedule.timesteps)
    assert again.sigma_data == schedule.sigma_data


def test_custom_schedule_keeps_its_values():
    source = schedules.zero_terminal_snr(schedules.cosine(50))
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
        ({"name": "custom", "alphas_cumprod": [0.5, 0.0, 0.0]}, "falling values"),
        ({"name": "ve", "sigma_min": 2.0, "sigma_max": 1.0}, "expected sigma_min < sigma_max"),
        ({"name": "edm", "sigma_data": 0.0}, "sigma_data: expected a positive number"),
        ({"name": "edm", "timestep_scale": -1.0}, "timestep_scale: expected a positive number"),
        ({"name": "edm", "steps": 1}, "at least 2"),
        ({"name": "vp_sde", "beta_min": 3.0, "beta_max": 2.0}, "expected beta_min <= beta_max"),
        ({"name": "sub_vp_sde", "time_min": 1.0}, "time_min: expected a number between 0 and 1"),
        ({"name": "zero_terminal_snr", "schedule": {"name": "flow"}}, "expected a discrete VP schedule, got 'flow'"),
        ({"name": "zero_terminal_snr", "schedule": "linear"}, "expected a discrete VP schedule, got 'linear'"),
    ],
)
def test_bad_configurations_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        schedules.from_config(config)


@pytest.mark.parametrize("tokens", [{"image_tokens": 0}, {"image_tokens": 10, "base_tokens": 5000}], ids=str)
def test_bad_token_counts_are_refused(tokens):
    with pytest.raises(InputError, match="tokens: expected"):
        schedules.dynamic_shift(**tokens)
