"""Objectives against their closed forms: a network that knows x_0 and the noise has no loss."""

import pytest
import torch

from fastdiff import schedules
from fastdiff.config import use_backend
from fastdiff.errors import InputError
from fastdiff.training.losses import Objective

CASES = [
    pytest.param("epsilon", schedules.linear(100), id="epsilon-linear"),
    pytest.param("epsilon", schedules.cosine(100), id="epsilon-cosine"),
    pytest.param("v", schedules.cosine(100), id="v-cosine"),
    pytest.param("v", schedules.linear(100), id="v-linear"),
    pytest.param("flow", schedules.flow(100), id="flow"),
]


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 50, 1, 4, 4, generator=generator)
    return x0, noise, torch.arange(50) * 2


def exact_output(prediction, schedule, x_t, x0, k):
    """What a network that knows x_0 answers to x_t, in float64, from x_t = alpha x_0 + sigma noise alone."""
    alpha, sigma = (torch.from_numpy(c.copy())[k].reshape(-1, 1, 1, 1) for c in (schedule.alphas, schedule.sigmas))
    noise = (x_t.double() - alpha * x0.double()) / sigma
    return {"epsilon": noise, "v": alpha * noise - sigma * x0.double(), "flow": noise - x0.double()}[prediction]


@pytest.mark.parametrize(("prediction", "schedule"), CASES)
@pytest.mark.parametrize("cap", [None, 5.0], ids=["plain", "capped"])
def test_perfect_network_has_no_loss(prediction, schedule, cap, batch):
    x0, noise, k = batch
    objective = Objective(prediction, schedule, cap)
    with use_backend("reference"):
        x_t = objective.noised(x0, noise, k)
    # At the cleanest steps float32 leaves few digits of the noise in x_t.
    loss = objective.per_sample(exact_output(prediction, schedule, x_t, x0, k), x0, noise, k)
    assert loss.shape == (50,)
    assert loss.max() < 1e-8
    wrong = objective.per_sample(1.1 * exact_output(prediction, schedule, x_t, x0, k), x0, noise, k)
    assert (wrong > 1e-6).all()


@pytest.mark.parametrize(("prediction", "schedule"), CASES)
def test_loss_of_zero_is_the_mean_square_of_the_target(prediction, schedule, batch):
    x0, noise, k = batch
    loss = Objective(prediction, schedule).per_sample(torch.zeros_like(x0), x0, noise, k)
    alpha, sigma = (
        torch.from_numpy(c.copy())[k].float().reshape(-1, 1, 1, 1) for c in (schedule.alphas, schedule.sigmas)
    )
    target = {"epsilon": noise, "v": alpha * noise - sigma * x0, "flow": noise - x0}[prediction]
    torch.testing.assert_close(loss, target.square().mean(dim=(1, 2, 3)))


@pytest.mark.parametrize(("prediction", "schedule"), CASES)
def test_cap_weighs_every_prediction_alike(prediction, schedule, batch):
    """An error d in x_0 costs min(snr, cap) d^2, whatever the network predicts."""
    x0, noise, k = batch
    cap, d = 5.0, 0.25
    objective = Objective(prediction, schedule, cap)
    alpha, sigma = (torch.from_numpy(c.copy())[k].reshape(-1, 1, 1, 1) for c in (schedule.alphas, schedule.sigmas))
    x_t = alpha * x0.double() + sigma * noise.double()
    output = exact_output(prediction, schedule, x_t, x0.double() + d, k)
    loss = objective.per_sample(output, x0, noise, k)
    expected = torch.clamp((alpha / sigma) ** 2, max=cap).flatten() * d**2
    torch.testing.assert_close(loss.double(), expected, rtol=2e-3, atol=1e-9)


def test_timesteps_are_those_the_schedule_names():
    k = torch.tensor([0, 99])
    assert Objective("v", schedules.cosine(100)).timesteps(k).tolist() == [0, 99]
    assert Objective("flow", schedules.flow(100)).timesteps(k).tolist() == [1, 100]


@pytest.mark.parametrize(
    ("prediction", "schedule", "cap", "message"),
    [
        ("noise", schedules.cosine(10), None, "expected one of epsilon, v, flow"),
        ("flow", schedules.cosine(10), None, "flow schedule"),
        ("v", schedules.flow(10), None, "flow schedule"),
        ("v", schedules.cosine(10), 0.0, "positive"),
    ],
    ids=["unknown", "flow-on-cosine", "v-on-flow", "cap"],
)
def test_bad_objectives(prediction, schedule, cap, message):
    with pytest.raises(InputError, match=message):
        Objective(prediction, schedule, cap)
