"""The linear multistep method of k-diffusion against diffusers at every step."""

import numpy as np
import pytest
import torch
from drop_in import SHAPE, assert_close_in_half, assert_parity, network, pair, relative

NAME = "LMSDiscreteScheduler"
# The constructor places every training timestep one by one.
FEW = {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.12}
CONFIGS = {
    "defaults": {},
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "scaled_linear leading": {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True, "prediction_type": "v_prediction"},
    "beta": {"use_beta_sigmas": True},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained betas": {"trained_betas": np.linspace(1e-3, 0.15, 100)},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_lms_parity(config):
    for steps in (1, 2, 7, 20):
        assert_parity(NAME, {**FEW, **config}, steps=steps)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6])
def test_lms_orders(order):
    assert_parity(NAME, FEW, step_options={"order": order})


@pytest.mark.parametrize("options", [{"begin": 5}, {"skip": 5}], ids=["set_begin_index", "the timestep alone"])
@pytest.mark.parametrize("order", [4, 5])
def test_lms_from_the_middle(order, options):
    assert_parity(NAME, FEW, steps=20, step_options={"order": order}, **options)


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 7), (1, 2, 3, 4, 5)], ids=str)
def test_lms_any_rank(shape):
    assert_parity(NAME, FEW, steps=5, shape=shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_lms_half(prediction, dtype):
    assert_close_in_half(NAME, {**FEW, "prediction_type": prediction}, dtype)


def test_the_order_may_change_from_step_to_step():
    orders, results = (4, 1, 3, 2, 4, 5, 4, 1, 4, 4), []
    start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for scheduler in pair(NAME, FEW):
        scheduler.set_timesteps(len(orders))
        x, states = start * scheduler.init_noise_sigma, []
        for order, t in zip(orders, scheduler.timesteps, strict=True):
            x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, order=order).prev_sample
            states += [x, *scheduler.derivatives]
        results.append(states)
    for our, their in zip(*results, strict=True):
        assert relative(our, their) < 1e-5


def test_derivatives_may_be_set():
    results = []
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for scheduler in pair(NAME, FEW):
        scheduler.set_timesteps(10)
        scheduler.set_begin_index(4)
        scheduler.scale_model_input(x, scheduler.timesteps[4])
        scheduler.derivatives = [0.1 * i * x for i in range(3)]
        results.append(scheduler.step(0.5 * x, scheduler.timesteps[4], x).prev_sample)
    assert relative(*results) < 1e-5


def test_a_missing_scale_model_input_is_warned_of():
    x = torch.zeros(SHAPE)
    for scheduler in pair(NAME, FEW):
        scheduler.set_timesteps(3)
        with pytest.warns(UserWarning, match="scale_model_input"):
            scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("spacing", [{}, {"use_karras_sigmas": True}, {"use_beta_sigmas": True}], ids=str)
def test_weights_are_those_of_diffusers(spacing):
    """Which depend on what float32 leaves of the levels' differences."""
    ours, theirs = pair(NAME, {**FEW, **spacing})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(90)
    for row in (3, 40, 88):
        mine, others = ([s.get_lms_coefficient(4, row, j) for j in range(4)] for s in (ours, theirs))
        assert mine == others


@pytest.mark.parametrize("shrunk", [1.0, 1 / 30])
@pytest.mark.parametrize(
    ("config", "steps"),
    [
        ({"beta_schedule": "squaredcos_cap_v2", "use_exponential_sigmas": True, "timestep_spacing": "leading"}, 100),
        ({"use_karras_sigmas": True}, 50),
        ({"use_exponential_sigmas": True}, 50),
        ({"timestep_spacing": "trailing"}, 100),
    ],
    ids=str,
)
def test_last_steps_that_multiply_the_rounding_of_slopes(config, steps, shrunk):
    """Levels lie close before the last one, and a polynomial through them is large at 0."""
    config = {**config, "prediction_type": "v_prediction"}
    ours, theirs = pair(NAME, config)
    first = steps - 8
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
        scheduler.set_begin_index(first)
    generator = torch.Generator().manual_seed(1)
    x = shrunk * torch.randn(SHAPE, generator=generator) * (1.0 + float(theirs.sigmas[first]) ** 2) ** 0.5
    for t in theirs.timesteps[first:]:
        m = network(theirs.scale_model_input(x, t), t)
        ours.scale_model_input(x, t)
        our, their = (scheduler.step(m, t, x).prev_sample for scheduler in (ours, theirs))
        assert relative(our, their) < 1e-5
        x = their


@pytest.mark.parametrize("steps", [1, 4, 30])
@pytest.mark.parametrize("order", [1, 4])
def test_a_network_that_predicts_no_data_at_the_end(order, steps):
    """The state is then what rounding leaves of it."""
    options = {"steps": steps, "step_options": {"order": order}}
    assert_parity(NAME, {"prediction_type": "sample"}, model=lambda x, t: x * float(t) / (float(t) + 1.0), **options)


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [10, 20, 30, 50, 100])
def test_usual_runs_have_a_row_for_each_step(steps, spacing):
    ours, _ = pair(NAME, {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012})
    ours.register_to_config(timestep_spacing=spacing)
    ours.set_timesteps(steps)
    ours._begin(0)
    assert not ours._theirs | ours._cancelling


@pytest.mark.parametrize("begin", [4, 5])
def test_uneven_steps_from_the_middle(begin):
    """Weights without the slopes that they are for take the state far off, and the last step back."""
    config = {"beta_schedule": "squaredcos_cap_v2", "use_beta_sigmas": True, "steps_offset": 1}
    ours, theirs = pair(NAME, config)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
        scheduler.set_begin_index(begin)
    data, noise = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(4))
    x = 0.5 * data + float(theirs.sigmas[begin]) * noise
    for t, sigma in zip(theirs.timesteps[begin:], theirs.sigmas[begin:].tolist(), strict=False):
        theirs.scale_model_input(x, t), ours.scale_model_input(x, t)
        m = (x - 0.8 * torch.tanh(x / (1.0 + sigma**2) + 0.7 * data)) / sigma
        our, their = (scheduler.step(m, t, x).prev_sample for scheduler in (ours, theirs))
        assert relative(our, their) < 1e-5
        x = their
