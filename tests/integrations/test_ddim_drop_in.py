"""DDIMScheduler and DDIMInverseScheduler against diffusers at every step."""

import pytest
import torch
from drop_in import SHAPE, assert_close_in_half, assert_parity, network, pair, relative

NAME, INVERSE = "DDIMScheduler", "DDIMInverseScheduler"
CONFIGS = {
    "defaults": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "latent": {
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    "betas of the caller": {"trained_betas": [0.01 * i for i in range(1, 31)], "num_train_timesteps": 30},
    "sample": {"prediction_type": "sample", "timestep_spacing": "linspace"},
    "v, clipped wide": {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "clip_sample_range": 2.5},
    "zero snr, v": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "zero snr, sample": {"rescale_betas_zero_snr": True, "prediction_type": "sample", "timestep_spacing": "trailing"},
    "zero snr, epsilon": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "threshold, not the clip": {"thresholding": True, "clip_sample_range": 3.0},
    "threshold": {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.8},
}
INVERSES = {
    "defaults": {},
    "unclipped": {"clip_sample": False, "beta_schedule": "scaled_linear"},
    "trailing": {"timestep_spacing": "trailing"},
    "not from the data": {"set_alpha_to_one": False, "prediction_type": "sample"},
    "cosine, v": {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2"},
    "zero snr": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
    "offset": {"steps_offset": 1, "clip_sample_range": 3.0},
}


@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parity(config, eta):
    for steps in (2, 7, 20):
        assert_parity(NAME, config, steps=steps, step_options={"eta": eta})


def test_one_step():
    assert_parity(NAME, {}, steps=1, step_options={"eta": 1.0})


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("config", [{}, {"clip_sample": False}], ids=["clipped", "not clipped"])
def test_the_noise_of_clipped_data(config, eta):
    assert_parity(NAME, config, steps=10, step_options={"eta": eta, "use_clipped_model_output": True})


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
def test_any_timestep_in_any_order(schedule):
    """Of the run and between its timesteps, as numbers and as tensors."""
    ours, theirs = pair(NAME, {"beta_schedule": schedule})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(1000)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(1)).tolist()
    for steps in (1000, 50):
        for scheduler in (ours, theirs):
            scheduler.set_timesteps(steps)
        for number, time in enumerate(order[:300]):
            results = []
            for scheduler in (theirs, ours):
                t = torch.tensor(time) if number % 2 else time
                generator = torch.Generator().manual_seed(number)
                results.append(scheduler.step(network(x, t), t, x, eta=0.8, generator=generator, return_dict=False)[0])
            assert relative(results[1], results[0]) < 1e-5, time


def test_the_noise_of_short_steps():
    """Of one timestep each, whose variance diffusers has with four digits: the same ones here."""
    ours, theirs = pair(NAME)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(1000)
    for time in range(1, 20):
        states = []
        for scheduler in (theirs, ours):
            generator = torch.Generator().manual_seed(time)
            states.append(scheduler.step(x, time, x, eta=1.0, generator=generator).prev_sample)
        assert relative(states[1], states[0]) < 3e-7, time


def test_a_timestep_with_a_dimension():
    """It is a factor with a dimension in diffusers, and so makes float32 of half precision."""
    x = torch.randn(SHAPE).half()
    results = []
    for scheduler in pair(NAME):
        scheduler.set_timesteps(5)
        results.append(scheduler.step(0.3 * x, scheduler.timesteps[1:2], x, return_dict=False))
    for our, their in zip(*results, strict=True):
        assert our.dtype == their.dtype == torch.float32
        assert relative(our, their) < 1e-5


def test_other_noise():
    ours, theirs = pair(NAME)
    x, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(5)
        with pytest.raises(ValueError, match="generator"):
            scheduler.step(x, 400, x, eta=0.5, generator=torch.Generator(), variance_noise=noise)
    for eta in (0.5, 1, 1.2, -0.5):
        for other in (noise, noise.double(), noise[:1]):
            results = [
                s.step(0.4 * x, 400, x, eta=eta, variance_noise=other, return_dict=False) for s in (theirs, ours)
            ]
            for their, our in zip(*results, strict=True):
                assert our.dtype == their.dtype
                torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_what_is_changed_counts():
    """The configuration, the number of steps, the schedule and its clean end."""
    ours, theirs = pair(NAME, {"clip_sample": False})
    x = torch.randn(SHAPE)

    def agree(time):
        results = [s.step(0.3 * x, time, x, return_dict=False) for s in (theirs, ours)]
        for their, our in zip(*results, strict=True):
            assert relative(our, their) < 1e-5

    for scheduler in (ours, theirs):
        scheduler.set_timesteps(5)
    agree(400)
    for change in (
        lambda s: s.register_to_config(prediction_type="v_prediction"),
        lambda s: setattr(s, "num_inference_steps", 10),
        lambda s: setattr(s, "alphas_cumprod", s.alphas_cumprod**1.1),
        lambda s: setattr(s, "final_alpha_cumprod", torch.tensor(0.9999)),
    ):
        for scheduler in (ours, theirs):
            change(scheduler)
        agree(400)
        agree(0)


def test_errors():
    x = torch.randn(SHAPE)
    for scheduler in pair(NAME):
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step(x, 0, x)
        scheduler.set_timesteps(5)
        with pytest.raises(IndexError):
            scheduler.step(x, 5000, x)
        with pytest.raises(RuntimeError):
            scheduler.step(torch.cat([x, x], dim=1), 0, x)
        with pytest.raises(RuntimeError):
            scheduler.step(torch.cat([x, x]), 0, x)
        with pytest.raises(RuntimeError):
            scheduler.step(x, scheduler.timesteps, x)


def test_betas_fewer_than_the_timesteps():
    ours, theirs = pair(NAME, {"trained_betas": [0.1, 0.3]})
    x = torch.randn(SHAPE)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(1000)
    for time in (1, 0):
        results = [
            s.step(0.3 * x, time, x, eta=0.5, generator=torch.Generator(), return_dict=False) for s in (theirs, ours)
        ]
        for their, our in zip(*results, strict=True):
            assert relative(our, their) < 1e-5


@pytest.mark.parametrize("config", INVERSES.values(), ids=INVERSES)
def test_inverse_parity(config):
    for steps in (2, 7, 20):
        assert_parity(INVERSE, config, steps=steps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_half(prediction, dtype):
    assert_close_in_half(NAME, {"prediction_type": prediction}, dtype)
    assert_close_in_half(INVERSE, {"prediction_type": prediction, "set_alpha_to_one": False}, dtype)


@pytest.mark.parametrize("model_dtype", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
def test_mixed_dtypes(prediction, dtype, model_dtype):
    ours, theirs = pair(NAME, {"prediction_type": prediction})
    x = torch.randn(SHAPE)
    results = []
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(5)
        generator = torch.Generator().manual_seed(0)
        inputs = (0.3 * x).to(model_dtype), 400, x.to(dtype)
        results.append(scheduler.step(*inputs, eta=0.5, generator=generator, return_dict=False))
    exact = all(value in (torch.float32, torch.float64) for value in (dtype, model_dtype))
    for their, our in zip(*results, strict=True):
        assert our.dtype == their.dtype
        assert relative(our, their) < (1e-5 if exact else 1e-2)
