"""DDPM with learned variances: Nichol and Dhariwal 2021, equation 15, and diffusers."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from diffusers_peer import network, relative, schedule_of, scheduler_for, table_for
from interpret import solve, trajectory
from mixture import Mixture
from stochastic import COUNT, KS_BOUND, VARIANCE_BOUND, figures

from fastdiff import samplers, schedules
from fastdiff.ops.row import INPUTS, NEW_X, VARIANCE

VP, STEPS = schedules.linear(1000), 10
SHAPE = (2, 3, 5, 5)


def variances(table, i):
    """(posterior, forward) of the step from point i to the next."""
    bar, bar1 = table.grid.alphas[i] ** 2, table.grid.alphas[i + 1] ** 2
    beta = 1 - bar / bar1
    return (1 - bar1) / (1 - bar) * beta, beta


def noise_of(table, i):
    return table.rows[i, NEW_X][INPUTS.index("noise")]


def test_learned_range():
    table = samplers.build("ddpm", schedule=VP, steps=STEPS, prediction="epsilon", variance="learned_range")
    assert table.learned_variance
    for i in range(STEPS - 1):
        small, large = variances(table, i)
        for w in (-1.0, -0.3, 0.0, 1.0):
            log_variance = (w + 1) / 2 * math.log(large) + (1 - w) / 2 * math.log(small)
            found = noise_of(table, i) * math.exp(table.rows[i, VARIANCE] * w)
            assert found == pytest.approx(math.exp(log_variance / 2), rel=1e-9)


def test_learned():
    table = samplers.build("ddpm", schedule=VP, steps=STEPS, prediction="epsilon", variance="learned")
    assert [noise_of(table, i) for i in range(STEPS)] == [1.0] * (STEPS - 1) + [0.0]
    assert table.rows[:, VARIANCE].tolist() == [0.5] * (STEPS - 1) + [0.0]


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_the_step_to_the_data_adds_no_noise(variance):
    table = samplers.build("ddpm", schedule=VP, steps=STEPS, prediction="epsilon", variance=variance)
    assert [use.noise for use in table.uses] == [True] * (STEPS - 1) + [False]
    assert table.rows[-1, VARIANCE] == 0.0


@pytest.mark.parametrize("w", [-1.0, 1.0])
def test_the_ends_of_the_range_are_the_fixed_variances(w):
    options = {"schedule": VP, "steps": STEPS, "prediction": "v"}
    fixed = samplers.build("ddpm", variance="fixed_small" if w < 0 else "fixed_large", **options)
    learned = samplers.build("ddpm", variance="learned_range", **options)
    x, draws = np.ones(4), np.random.default_rng(0).standard_normal((STEPS, 4))

    def network(x, t):
        return np.sin(x + t)

    pairs = zip(
        trajectory(lambda x, t: (network(x, t), w), learned, x, lambda i: draws[i]),
        trajectory(network, fixed, x, lambda i: draws[i]),
        strict=True,
    )
    for ours, same in pairs:
        np.testing.assert_allclose(ours, same, rtol=1e-9)


@pytest.mark.parametrize("w", [-0.5, 0.8])
def test_distribution(w):
    """Any variance of the range leaves the data's distribution in many steps; one well outside of it does not."""
    mixture, steps = Mixture(), 250
    table = samplers.build("ddpm", schedule=VP, steps=steps, prediction="v", spacing="karras", variance="learned_range")
    exact = mixture.denoiser(VP, "v")
    errors = []
    for value in (w, 14.0):
        generator = np.random.default_rng(5)
        start = mixture.sample(generator, COUNT, *table.init_level)
        draw = partial(generator.standard_normal, COUNT)
        end = solve(lambda x, t, v=value: (exact(x, t), v), table, start, lambda _, draw=draw: draw())
        errors.append(figures(end))
    (distance, mean, variance), (far, _, large) = errors
    assert distance < KS_BOUND
    assert mean < 4.0
    assert variance < VARIANCE_BOUND
    assert far > KS_BOUND
    assert large > VARIANCE_BOUND


@pytest.mark.parametrize("variance", ["learned_range", "learned"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
def test_diffusers(variance, prediction):
    """Its "learned" takes the network's channels as the variance; ours takes their logarithm, as the paper's code."""
    for steps in (1, 7, 20):
        scheduler = scheduler_for("ddpm", "linear", prediction, variance_type=variance)
        table = table_for("ddpm", scheduler, prediction, steps, variance=variance)
        scheduler.set_timesteps(steps)
        schedule = schedule_of(scheduler)
        x, generator = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)), torch.Generator().manual_seed(2)
        twin = torch.Generator().manual_seed(2)
        for index, t in enumerate(scheduler.timesteps):
            m = network(schedule, prediction, x, float(t))
            w = torch.tanh(3.0 * m) if variance == "learned_range" else 0.01 + torch.sigmoid(m)
            ours = w if variance == "learned_range" else w.log()
            theirs = scheduler.step(torch.cat([m, w], dim=1), t, x, generator=generator).prev_sample
            noise = torch.randn(SHAPE, generator=twin) if int(t) > 0 else torch.zeros(SHAPE)
            found = one_row(table, index, x, m, ours, noise)
            assert relative(found, theirs) < 1e-5
            x = theirs


def one_row(table, index, x, m, w, noise):
    row = table.rows[index]
    c = dict(zip(INPUTS, row[NEW_X].tolist(), strict=True))
    ax, am = row[1:3]
    data = (ax * x.double() + am * m.double()).clamp(-row[3], row[3])
    return c["x"] * x + c["D"] * data + c["noise"] * torch.exp(row[VARIANCE] * w.double()) * noise


def test_diffusers_logarithmic_names():
    """fixed_small_log has fixed_small's numbers; fixed_large_log takes the square root of a negative logarithm."""
    noises = {}
    for name in ("fixed_small", "fixed_small_log", "fixed_large_log"):
        scheduler = scheduler_for("ddpm", "linear", "epsilon", variance_type=name)
        scheduler.set_timesteps(10)
        x = torch.ones(SHAPE)
        given = {"generator": torch.Generator().manual_seed(0)}
        noises[name] = scheduler.step(0.1 * x, scheduler.timesteps[2], x, **given).prev_sample
    assert relative(noises["fixed_small_log"], noises["fixed_small"]) < 1e-6
    assert noises["fixed_large_log"].isnan().all()


def test_diffusers_adds_learned_noise_to_the_result():
    """Unless its last step starts at timestep 0; ours ends at the data."""
    config = {"variance_type": "learned_range", "timestep_spacing": "trailing"}
    scheduler = scheduler_for("ddpm", "linear", "epsilon", **config)
    scheduler.set_timesteps(10)
    x, m = torch.zeros(2, 3, 40, 40), torch.zeros(2, 3, 40, 40)
    t = scheduler.timesteps[-1]
    end = scheduler.step(torch.cat([m, m + 1.0], dim=1), t, x, generator=torch.Generator().manual_seed(0)).prev_sample
    assert float(end.std()) == pytest.approx(float(VP.at(float(t))[1]), rel=0.05)
