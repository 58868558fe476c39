"""Guidance in the loop against the same combination written out in float64 around the network."""

import math

import numpy as np
import pytest
import torch
from interpret import solve

import fastdiff
from fastdiff import Guidance, ops, samplers, schedules
from fastdiff.errors import InputError
from fastdiff.noise import STREAM_INITIAL, seed_tensor

SHAPE = (3, 2, 4, 5)
SEEDS = [4, 9, -2]
VP = schedules.linear(1000)


def table(method: str = "dpmpp_2m", prediction: str = "v", steps: int = 6, **options) -> samplers.StepTable:
    return samplers.build(method, schedule=VP, steps=steps, prediction=prediction, **options)


def condition(x, t, k: int):
    """The network's output under condition k, 0 being none; NumPy or torch."""
    sin = np.sin if isinstance(x, np.ndarray) else torch.sin
    return 0.7 * sin((1.0 + 0.3 * k) * x + 0.1 * k) + 0.05 * k * x + 1e-4 * t


def denoiser(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The groups of conditions 0, 1, ... of the batch; a batch that is not repeated has condition 1."""
    groups = x.split(len(SEEDS))
    times = t[: len(SEEDS)].reshape(-1, 1, 1, 1)
    numbers = range(len(groups)) if len(groups) > 1 else [1]
    return torch.cat([condition(group, times, k) for group, k in zip(groups, numbers, strict=True)])


def expected(steps: samplers.StepTable, combine) -> torch.Tensor:
    """The run with m = combine(x, t) in float64."""
    noise = ops.philox_normal(seed_tensor(SEEDS), SHAPE, stream=STREAM_INITIAL)
    return torch.from_numpy(solve(combine, steps, steps.init_scale * noise.double().numpy()))


def check(steps: samplers.StepTable, guidance: Guidance, combine) -> None:
    found = fastdiff.run(denoiser, steps, shape=SHAPE, seeds=SEEDS, guidance=guidance)
    torch.testing.assert_close(found.double(), expected(steps, combine), rtol=1e-4, atol=2e-5)


def per_sample(values: np.ndarray) -> np.ndarray:
    return values.reshape(-1, 1, 1, 1)


def test_several_conditions():
    def combine(x, t):
        base = condition(x, t, 0)
        return base + 2.5 * (condition(x, t, 1) - base) - 1.5 * (condition(x, t, 2) - base)

    check(table(), Guidance(scale=(2.5, -1.5)), combine)


@pytest.mark.parametrize("rescale", [0.7, 1.0])
@pytest.mark.parametrize("scales", [(4.0,), (4.0, -1.0)])
def test_rescale(scales, rescale):
    """Lin et al. 2024, equations 15 and 16, one factor for each sample."""

    def combine(x, t):
        base, first = condition(x, t, 0), condition(x, t, 1)
        m = base + sum(scale * (condition(x, t, k + 1) - base) for k, scale in enumerate(scales))
        ratio = per_sample(first.std(axis=(1, 2, 3)) / m.std(axis=(1, 2, 3)))
        return rescale * m * ratio + (1.0 - rescale) * m

    check(table(), Guidance(scale=scales, rescale=rescale), combine)


def test_perpendicular():
    """Armandpour et al. 2023: the part of the negative prompt along the prompt is left out."""

    def combine(x, t):
        base = condition(x, t, 0)
        main, other = condition(x, t, 1) - base, condition(x, t, 2) - base
        along = per_sample((main * other).sum(axis=(1, 2, 3)) / (main**2).sum(axis=(1, 2, 3)))
        return base + 6.0 * main - 3.0 * (other - along * main)

    check(table(), Guidance(scale=(6.0, -3.0), perpendicular=True), combine)


def test_interval_calls_the_network_once_outside():
    steps, sizes = table(steps=8, spacing="karras"), []
    ratios = steps.levels[:, 1] / steps.levels[:, 0]
    low, high = float(ratios[5]), float(ratios[2])

    def counted(x, t):
        sizes.append(len(x) // len(SEEDS))
        return denoiser(x, t)

    found = fastdiff.run(counted, steps, shape=SHAPE, seeds=SEEDS, guidance=Guidance(scale=3.0, interval=(low, high)))
    assert sizes == [1, 1, 2, 2, 2, 1, 1, 1]
    inside = {float(t) for t in steps.timesteps[2:5]}

    def combine(x, t):
        base, first = condition(x, t, 0), condition(x, t, 1)
        return base + 3.0 * (first - base) if t in inside else first

    torch.testing.assert_close(found.double(), expected(steps, combine), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("groups", [None, 2.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("method", ["ddim", "euler", "heun"])
def test_classifier_gradient_moves_the_data_prediction(method, prediction, groups):
    """x_0 + (sigma^2 / alpha) s grad log p(y | x), Dhariwal and Nichol 2021, whatever the network predicts."""
    # Up to a level of 5: above it the gradient counts sigma^2 / alpha times, and float32 sees little else.
    steps = table(method, prediction, spacing="karras", sigma_max=5.0)

    def gradient(x):
        return 0.4 - 0.3 * x

    def log_probability(x, t):
        assert t.shape == (len(SEEDS),)
        return (0.4 * x - 0.15 * x**2).sum(dim=(1, 2, 3))

    def combine(x, t):
        alpha, sigma = (float(value) for value in VP.at(t))
        base, first = condition(x, t, 0), condition(x, t, 1)
        m = first if groups is None else base + groups * (first - base)
        move = 1.7 * sigma**2 / alpha * gradient(x)
        c0, c1 = {"epsilon": (0.0, 1.0), "v": (-sigma, alpha), "sample": (1.0, 0.0)}[prediction]
        return m + c0 * move - c1 * alpha / sigma * move

    check(steps, Guidance(scale=groups, classifier=log_probability, classifier_scale=1.7), combine)


def test_outside_of_the_interval_the_classifier_says_nothing():
    steps = table("ddim", spacing="karras", sigma_max=5.0)
    ratios = steps.levels[:, 1] / steps.levels[:, 0]
    guidance = Guidance(classifier=lambda x, t: x.sum(dim=(1, 2, 3)), interval=(float(ratios[4]), float(ratios[1])))
    inside = {float(t) for t in steps.timesteps[1:4]}

    def combine(x, t):
        alpha, sigma = (float(value) for value in VP.at(t))
        # D = alpha x - sigma v moves by sigma^2 / alpha.
        return condition(x, t, 1) - (sigma / alpha if t in inside else 0.0)

    check(steps, guidance, combine)


def test_classifier_guidance_samples_the_posterior():
    """Data N(0, 1) and p(y | x_0) = N(x_0; y, 1/4): with the exact classifier of x_t the samples are p(x_0 | y)."""
    y, seeds = 1.0, range(4000)
    steps = table("ddim", "epsilon", steps=100, spacing="karras")

    def log_probability(x, t):
        alpha, sigma = VP.at(t.double().numpy())
        mean, variance = torch.from_numpy(alpha) * x[:, 0].double(), torch.from_numpy(sigma**2)
        return -0.5 * (y - mean) ** 2 / (variance + 0.25)

    def normal(x, t):
        return torch.from_numpy(VP.at(t.double().numpy())[1]).float()[:, None] * x

    guidance = Guidance(classifier=log_probability)
    found = fastdiff.run(normal, steps, shape=(4000, 1), seeds=seeds, guidance=guidance).double()
    assert float(found.mean()) == pytest.approx(0.8 * y, abs=4 * math.sqrt(0.2 / 4000) + 0.01)
    assert float(found.var()) == pytest.approx(0.2, rel=4 * math.sqrt(2 / 4000) + 0.02)


def test_a_sample_does_not_depend_on_its_batch():
    guidance = Guidance(scale=(3.0, -1.0), rescale=0.5, perpendicular=True)
    full = fastdiff.run(denoiser, table(), shape=SHAPE, seeds=SEEDS, guidance=guidance)

    def alone(x, t):
        groups = x.split(1)
        return torch.cat([condition(group, t[:1].reshape(-1, 1, 1, 1), k) for k, group in enumerate(groups)])

    for index, seed in enumerate(SEEDS):
        one = fastdiff.run(alone, table(), shape=(1, *SHAPE[1:]), seeds=[seed], guidance=guidance)
        torch.testing.assert_close(one[0], full[index], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "guidance: expected a scale or a classifier, got neither"),
        ({"scale": ()}, "guidance: expected a number for each condition, got none"),
        ({"scale": (1.0, float("nan"))}, "guidance: expected a finite number"),
        ({"scale": "7"}, "guidance: expected a finite number"),
        ({"scale": 7.0, "rescale": 1.5}, "rescale: expected a number from 0 to 1, got 1.5"),
        ({"scale": 7.0, "perpendicular": True}, "perpendicular: expected scales of at least two conditions"),
        ({"scale": 7.0, "interval": 0.3}, r"interval: expected \(low, high\) in sigma / alpha, got 0.3"),
        ({"scale": 7.0, "interval": (2.0, 1.0)}, "interval: expected 0 <= low < high"),
        ({"classifier": lambda x, t: x, "rescale": 0.5}, "rescale: expected 0 without a scale"),
        ({"classifier": lambda x, t: x, "classifier_scale": None}, "classifier_scale: expected a finite number"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else value,
)
def test_bad_guidance_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Guidance(**arguments)


def test_a_classifier_of_another_shape_is_refused():
    guidance = Guidance(classifier=lambda x, t: x)
    with pytest.raises(InputError, match=r"classifier: expected log p\(y \| x\) of shape \(3,\), got \(3, 2, 4, 5\)"):
        fastdiff.run(denoiser, table(), shape=SHAPE, seeds=SEEDS, guidance=guidance)
