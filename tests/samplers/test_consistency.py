"""LCM, TCD and consistency sampling: loops from the papers, and perfect consistency functions."""

import numpy as np
import pytest
import torch
from interpret import solve, trajectory
from mixture import Mixture
from stochastic import COUNT, KS_BOUND, figures

from fastdiff import samplers, schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import CLIP, INPUTS, KNOWN, NEW_X, PREDICTION

LINEAR = schedules.linear(1000)
BAR = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
FLOW = schedules.flow(1000)
EDM = schedules.edm(40, timestep_scale=1000.0)


def build(method: str, steps: int | None, schedule=LINEAR, prediction: str = "epsilon", **options):
    return samplers.build(method, schedule=schedule, steps=steps, prediction=prediction, **options)


def noises(shape: tuple[int, ...]):
    generator = np.random.default_rng(3)
    drawn = [generator.standard_normal(shape) for _ in range(60)]
    return drawn, lambda row: drawn[row]


def epsilon(x: np.ndarray, t: float) -> np.ndarray:
    return np.tanh(x) + 0.1 * np.cos(0.01 * t * x)


@pytest.mark.parametrize(("scaling", "spread"), [(10.0, 0.5), (0.02, 2.0)])
@pytest.mark.parametrize("steps", [1, 4, 7, 50])
def test_lcm_is_the_papers_loop(steps, scaling, spread):
    """Luo et al. 2023, algorithm 3: f(x, t) at each timestep, noised to the next; c_skip and c_out of section 3.1."""
    table = build("lcm", steps, clip=1.0, timestep_scaling=scaling, sigma_data=spread)
    origin = np.arange(1, 51) * 20 - 1
    times = [int(origin[::-1][i * 50 // steps]) for i in range(steps)]
    assert table.timesteps.tolist() == times
    drawn, noise = noises((9,))
    x = np.linspace(-2.0, 2.0, 9)
    states = trajectory(epsilon, table, x, noise)
    for i, (t, ours) in enumerate(zip(times, states, strict=True)):
        clean = np.clip((x - np.sqrt(1 - BAR[t]) * epsilon(x, t)) / np.sqrt(BAR[t]), -1.0, 1.0)
        root = np.hypot(scaling * t, spread)
        skip, out = (spread / root) ** 2, scaling * t / root
        x = skip * x + out * clean
        if i + 1 < steps:
            x = np.sqrt(BAR[times[i + 1]]) * x + np.sqrt(1 - BAR[times[i + 1]]) * drawn[i]
        np.testing.assert_allclose(ours, x, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_tcd_is_the_papers_loop(eta, prediction):
    """Zheng et al. 2024: DDIM from t past the next timestep to s, then noise from s back to it."""
    table = build("tcd", 7, prediction=prediction, eta=eta)
    times = [int(t) for t in table.timesteps]
    drawn, noise = noises((9,))
    x = np.linspace(-2.0, 2.0, 9)
    states = trajectory(epsilon, table, x, noise)
    for i, (t, ours) in enumerate(zip(times, states, strict=True)):
        a, b, m = np.sqrt(BAR[t]), np.sqrt(1 - BAR[t]), epsilon(x, t)
        clean, noisy = ((x - b * m) / a, m) if prediction == "epsilon" else (a * x - b * m, b * x + a * m)
        if i + 1 == len(times):
            x = clean
        else:
            after = times[i + 1]
            s = int(np.floor((1000 - round(1000 * eta)) * after / 1000)) if eta else after
            jumped = np.sqrt(BAR[s]) * clean + np.sqrt(1 - BAR[s]) * noisy
            x = np.sqrt(BAR[after] / BAR[s]) * jumped + np.sqrt(1 - BAR[after] / BAR[s]) * drawn[i]
        np.testing.assert_allclose(ours, x, rtol=1e-9, atol=1e-9)


def test_tcd_without_noise_is_ddim():
    for schedule, prediction in ((LINEAR, "v"), (FLOW, "flow")):
        tcd = build("tcd", 8, schedule, prediction, spacing="lcm", eta=0.0)
        np.testing.assert_allclose(tcd.rows, build("ddim", 8, schedule, prediction, spacing="lcm").rows, atol=1e-12)
        assert not any(use.noise for use in tcd.uses)


def test_tcd_keeps_a_clipped_prediction_consistent():
    """epsilon is the one that leads from x to the clipped D."""
    table = build("tcd", 6, clip=1.0)
    free = build("tcd", 6)
    for row, plain, (alpha, sigma), (alpha1, _) in zip(
        table.rows, free.rows, table.levels, table.rows[:, KNOWN], strict=True
    ):
        c, d = (dict(zip(INPUTS, values[NEW_X], strict=True)) for values in (row, plain))
        x, clean = 0.3, 1.0
        direction = d["m"] * (x - alpha * clean) / sigma
        assert c["x"] * x + c["D"] * clean == pytest.approx(alpha1 * clean + direction, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("steps", [1, 2, 6])
def test_consistency_is_the_papers_loop(steps):
    """Song et al. 2023, algorithm 1, with appendix C's scalings, Karras' levels and c_in of the network's input."""
    table = build("consistency", steps, EDM, "edm", clip=1.0, s_noise=1.2)
    ramp = np.arange(steps) / steps
    sigmas = (80 ** (1 / 7) + ramp * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    np.testing.assert_allclose(table.timesteps, 250 * np.log(sigmas), rtol=1e-12)
    drawn, noise = noises((9,))
    x = np.linspace(-150.0, 150.0, 9)
    states = trajectory(epsilon, table, x, noise)
    for i, (sigma, ours) in enumerate(zip(sigmas, states, strict=True)):
        skip = 0.25 / ((sigma - 0.002) ** 2 + 0.25)
        out = (sigma - 0.002) * 0.5 / np.sqrt(sigma**2 + 0.25)
        f = np.clip(skip * x + out * epsilon(x / np.sqrt(sigma**2 + 0.25), 250 * np.log(sigma)), -1.0, 1.0)
        x = f if i + 1 == steps else f + 1.2 * np.sqrt(sigmas[i + 1] ** 2 - 0.002**2) * drawn[i]
        np.testing.assert_allclose(ours, x, rtol=1e-9, atol=1e-11)
    assert table.init_scale == pytest.approx(80.0)


def test_consistency_is_the_identity_at_sigma_min():
    table = build("consistency", None, EDM, "edm", sigmas=[1.0, 0.002])
    assert table.rows[1, PREDICTION] == pytest.approx((1.0, 0.0), abs=1e-15)
    plain = build("consistency", 3, EDM, "sample")
    assert (plain.rows[:, PREDICTION] == (0.0, 1.0)).all()


def jump(x: np.ndarray, start: tuple[float, float], end: tuple[float, float] = (1.0, 0.0)) -> np.ndarray:
    """The exact probability flow from one level to another: quantiles stay quantiles."""
    mixture = Mixture()
    return mixture.quantile(mixture.cdf(x, *start), *end)


def result(table: samplers.StepTable, network, factor: float = 1.0) -> np.ndarray:
    generator, mixture = np.random.default_rng(5), Mixture()
    start = mixture.sample(generator, COUNT, table.grid.alphas[0], table.grid.sigmas[0])
    return solve(network, table, start, lambda _: factor * generator.standard_normal(COUNT))


def perfect_lcm(schedule, scaling: float | None):
    def network(x, t):
        alpha, sigma = (float(value) for value in schedule.at(t))
        if scaling is None:
            return jump(x, (alpha, sigma))
        u = scaling * t
        return (jump(x, (alpha, sigma)) - 0.25 / (u * u + 0.25) * x) * np.hypot(u, 0.5) / u

    return network


def perfect_tcd(x: np.ndarray, t: float, times: list[float]) -> np.ndarray:
    """The data prediction for which the step from t leads to the exact point of the flow at s."""
    later = [time for time in times if time < t]
    s = (lambda k: (BAR[k] ** 0.5, (1 - BAR[k]) ** 0.5))(int(0.7 * later[0] + 1e-9)) if later else (1.0, 0.0)
    start = BAR[int(t)] ** 0.5, (1 - BAR[int(t)]) ** 0.5
    slope = s[1] / start[1]
    return (jump(x, start, s) - slope * x) / (s[0] - slope * start[0])


def perfect_consistency(x: np.ndarray, t: float) -> np.ndarray:
    sigma = np.exp(t / 250.0)
    x = x * np.sqrt(sigma**2 + 0.25)
    skip, out = 0.25 / ((sigma - 0.002) ** 2 + 0.25), (sigma - 0.002) * 0.5 / np.sqrt(sigma**2 + 0.25)
    return (jump(x, (1.0, sigma), (1.0, 0.002)) - skip * x) / out


PERFECT = {
    "lcm": (build("lcm", 4, prediction="sample"), perfect_lcm(LINEAR, 10.0)),
    "lcm-none": (build("lcm", 3, FLOW, "sample", timestep_scaling=None), perfect_lcm(FLOW, None)),
    "tcd": (
        build("tcd", 4, prediction="sample"),
        lambda x, t: perfect_tcd(x, t, build("tcd", 4).timesteps.tolist()),
    ),
    "consistency": (build("consistency", 4, EDM, "edm"), perfect_consistency),
    "flow_euler": (build("flow_euler", 4, FLOW, "sample", stochastic=True), perfect_lcm(FLOW, None)),
}


@pytest.mark.parametrize("case", PERFECT)
def test_a_perfect_network_gives_the_data_in_few_steps(case):
    distance, mean, variance = figures(result(*PERFECT[case]))
    assert distance < KS_BOUND
    assert mean < 4.0
    assert variance < 4.0 * np.sqrt(2.0 / COUNT)


@pytest.mark.parametrize("case", PERFECT)
def test_a_wrong_noise_level_is_seen(case):
    for factor in (0.75, 1.25):
        distance, _, _ = figures(result(*PERFECT[case], factor))
        assert distance > KS_BOUND


def test_without_signal_at_the_start():
    """A zero-terminal-SNR schedule: v and sample say what the data is, epsilon does not."""
    schedule = schedules.zero_terminal_snr(LINEAR)
    for method in ("lcm", "tcd"):
        table = build(method, 4, schedule, "v")
        assert table.init_level == (0.0, 1.0)
        assert table.rows[0, PREDICTION] == pytest.approx((0.0, -1.0), abs=1e-15)
        with pytest.raises(InputError, match="does not determine the data"):
            build(method, 4, schedule, "epsilon")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("lcm", {"steps": 51}, "steps: spacing='lcm' picks them from 50 timesteps"),
        ("lcm", {"steps": 20, "strength": 0.3}, "picks them from 15 timesteps"),
        ("lcm", {"original_steps": 1001}, "original_steps: expected a whole number from 1 to 1000, got 1001"),
        ("lcm", {"strength": 0.01}, "strength: 0.01 of 50 steps leaves none"),
        ("lcm", {"timestep_scaling": 0.0}, "lcm: timestep_scaling: expected a positive number"),
        ("lcm", {"sigma_data": -1.0}, "lcm: sigma_data: expected a positive number"),
        ("lcm", {"schedule": EDM, "prediction": "edm"}, "timesteps of at least 0; pass timestep_scaling=None"),
        ("tcd", {"eta": 1.5}, "eta: expected a number from 0 to 1"),
        ("ddim", {"original_steps": 50}, "original_steps: has no effect with spacing='trailing'"),
        ("consistency", {}, "consistency: needs a ve schedule"),
    ],
    ids=str,
)
def test_bad_requests_are_refused(method, options, message):
    arguments = {"schedule": LINEAR, "steps": 4, "prediction": "epsilon", **options}
    with pytest.raises(InputError, match=message):
        samplers.build(method, **arguments)


def test_more_steps_than_were_distilled():
    table = build("lcm", 200, original_steps=200)
    assert table.timesteps.tolist() == [5 * k - 1 for k in range(200, 0, -1)]
    assert build("lcm", 4, schedules.linear(30)).timesteps.tolist() == [29, 22, 14, 7]
    shifted = build("lcm", 4, schedules.flow(1000, shift=3.0), "flow")
    u = np.array([1.0, 0.76, 0.5, 0.26])
    np.testing.assert_allclose(shifted.grid.sigmas[:-1], 3 * u / (1 + 2 * u), rtol=1e-12)
    assert torch.tensor(table.rows[:, CLIP]).isinf().all()
