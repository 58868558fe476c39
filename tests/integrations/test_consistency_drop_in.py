"""LCMScheduler and TCDScheduler against diffusers at every step."""

import pytest
import torch
from drop_in import SHAPE, assert_close_in_half, assert_parity, pair

NAMES = ("LCMScheduler", "TCDScheduler")
CONFIGS = {
    "defaults": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "linear": {"beta_schedule": "linear", "set_alpha_to_one": False},
    "sample": {"prediction_type": "sample"},
    "v": {"prediction_type": "v_prediction", "timestep_scaling": 3.0},
    "zero snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True},
    "clipped": {"clip_sample": True, "clip_sample_range": 1.5},
    "threshold": {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.8},
    "betas of the caller": {
        "trained_betas": [0.01 * i for i in range(1, 31)],
        "num_train_timesteps": 30,
        "original_inference_steps": 30,
    },
}
GRIDS = {
    "other original steps": {"num_inference_steps": 4, "original_inference_steps": 20},
    "all steps": {"num_inference_steps": 200, "original_inference_steps": 200},
    "strength": {"num_inference_steps": 4, "strength": 0.5},
    "timesteps": {"timesteps": [900, 700, 13, 5, 1]},
    "timesteps down to 0": {"timesteps": [999, 500, 0]},
    "timesteps with strength": {"timesteps": [900, 700, 13, 5, 1], "strength": 0.5},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("name", NAMES)
def test_parity(name, config):
    for steps in (1, 2, 7, 20):
        assert_parity(name, config, steps=steps)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_timesteps(name, grid):
    """With timesteps of one's own and a strength, the last step of diffusers is not the last that it counts."""
    assert_parity(name, {}, steps=None, set_options=grid, shape=(1, 2, 4, 4))


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("eta", [0, 0.1, 0.5, 1.0])
def test_tcd_eta(eta, prediction):
    for options in ({"num_inference_steps": 8}, {"timesteps": [900, 700, 13, 5, 1], "strength": 0.7}):
        config = {"prediction_type": prediction}
        assert_parity("TCDScheduler", config, steps=None, set_options=options, step_options={"eta": eta})


def test_tcd_refuses_another_eta_as_diffusers_does():
    for scheduler in pair("TCDScheduler"):
        scheduler.set_timesteps(4)
        x = torch.randn(SHAPE)
        with pytest.raises(AssertionError):
            scheduler.step(x, scheduler.timesteps[0], x, eta=1.5)


@pytest.mark.parametrize("options", [{"begin": 3}, {"skip": 3}], ids=["set_begin_index", "the timestep alone"])
@pytest.mark.parametrize("name", NAMES)
def test_a_start_from_the_middle(name, options):
    assert_parity(name, {}, steps=8, **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_timestep_beside_the_index(name):
    """The index says where the step ends, the timestep where it starts."""
    ours, theirs = pair(name)
    x = torch.randn(SHAPE)
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
        scheduler.set_begin_index(1)
        results.append(scheduler.step(0.3 * x, 811, x, generator=torch.Generator().manual_seed(0), return_dict=False))
    for our, their in zip(*results, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_number_of_steps_says_which_is_the_last(name):
    ours, theirs = pair(name)
    x = torch.randn(SHAPE)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
        scheduler.num_inference_steps = 2
    for index in range(3):
        results = []
        for scheduler in (ours, theirs):
            generator = torch.Generator().manual_seed(index)
            results.append(
                scheduler.step(0.3 * x, scheduler.timesteps[index], x, generator=generator, return_dict=False)
            )
        for our, their in zip(*results, strict=True):
            torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)


def test_lcm_scaling():
    """It matters at the first timesteps alone."""
    options = {"timesteps": [900, 3, 1, 0]}
    assert_parity("LCMScheduler", {"timestep_scaling": 0.3}, steps=None, set_options=options)


@pytest.mark.parametrize("name", NAMES)
def test_errors(name):
    x = torch.randn(SHAPE)
    for scheduler in pair(name):
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step(x, 0, x)
        scheduler.set_timesteps(4)
        with pytest.raises(IndexError):
            scheduler.step(x, 1, x)


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 8), (1, 3, 2, 4, 4)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_ranks(name, shape):
    assert_parity(name, {}, steps=4, shape=shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_half(name, dtype):
    for prediction in ("epsilon", "sample", "v_prediction"):
        assert_close_in_half(name, {"prediction_type": prediction}, dtype)


def test_the_boundary_has_the_scale_of_the_data():
    ours, theirs = pair("LCMScheduler")
    x = torch.ones(SHAPE)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(2)
        scheduler.step(x, scheduler.timesteps[0], x)
    assert ours.sigma_data == theirs.sigma_data
