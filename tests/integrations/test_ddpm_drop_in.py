"""DDPMScheduler against diffusers at every step."""

import diffusers
import pytest
import torch
from drop_in import SHAPE, assert_close_in_half, assert_parity, network, pair, relative, with_variance

NAME = "DDPMScheduler"
CONFIGS = {
    "defaults": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid", "prediction_type": "v_prediction"},
    "laplace": {"beta_schedule": "laplace", "clip_sample_range": 2.5},
    "scaled linear": {"beta_schedule": "scaled_linear", "clip_sample": False},
    "betas of the caller": {"trained_betas": [0.01 * i for i in range(1, 31)], "num_train_timesteps": 30},
    "sample": {"prediction_type": "sample", "timestep_spacing": "linspace"},
    "v": {"prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "offset": {"steps_offset": 1, "variance_type": "fixed_large"},
    "zero snr, v": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "zero snr, sample": {"rescale_betas_zero_snr": True, "prediction_type": "sample", "timestep_spacing": "trailing"},
    "zero snr, epsilon": {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
    "threshold": {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.8},
    "threshold, not the clip": {"thresholding": True, "clip_sample_range": 3.0},
    "threshold below one": {"thresholding": True, "sample_max_value": 0.7},
}
SPACINGS = ("leading", "trailing", "linspace")


def positive_variance(x, t):
    return torch.cat([network(x, t), torch.sin(3.0 * x.float()).abs().to(x.dtype)], dim=1)


VARIANCES = {
    "fixed_small": network,
    "fixed_small_log": network,
    "fixed_large": network,
    "learned": positive_variance,
    "learned_range": with_variance,
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parity(config):
    for steps in (2, 7, 20):
        assert_parity(NAME, config, steps=steps)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("variance", VARIANCES)
def test_variances(variance, spacing):
    """With the noise of the last step, which ends at the data: where it starts at timestep 0 there is none."""
    for steps in (1, 5):
        config = {"variance_type": variance, "timestep_spacing": spacing, "clip_sample": False}
        assert_parity(NAME, config, steps=steps, model=VARIANCES[variance])


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_all_timesteps(variance, schedule):
    """Where a step is one timestep, diffusers has four digits of its variance."""
    ours, theirs = pair(NAME, {"variance_type": variance, "beta_schedule": schedule})
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for time in range(1000):
        results = []
        for scheduler in (theirs, ours):
            generator = torch.Generator().manual_seed(time)
            results.append(scheduler.step(network(x, time), time, x, generator, return_dict=False))
        for their, our in zip(*results, strict=True):
            assert relative(our, their) < 1e-5, time


def test_a_thousand_steps():
    assert_parity(NAME, {"variance_type": "learned_range"}, steps=1000, model=with_variance, shape=(1, 2, 4, 4))


@pytest.mark.parametrize("timesteps", [[900, 700, 13, 5, 1], [999, 0], [3]], ids=str)
def test_custom_timesteps(timesteps):
    assert_parity(NAME, {}, steps=None, set_options={"timesteps": timesteps})


def test_a_start_from_the_middle():
    assert_parity(NAME, {}, steps=10, skip=4)


@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 8), (1, 3, 2, 4, 4), (1, 1, 1, 1)], ids=str)
def test_ranks(shape):
    assert_parity(NAME, {}, steps=4, shape=shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_half(prediction, dtype):
    assert_close_in_half(NAME, {"prediction_type": prediction}, dtype)


def test_fixed_large_log_is_no_number_as_in_diffusers():
    ours, theirs = pair(NAME, {"variance_type": "fixed_large_log"})
    x = torch.randn(SHAPE)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(5)
        state, data = scheduler.step(network(x, 0), scheduler.timesteps[0], x, return_dict=False)
        assert state.isnan().all()
        assert data.isfinite().all()


def test_a_timestep_of_no_run_is_refused_as_in_diffusers():
    ours, theirs = pair(NAME)
    x = torch.randn(SHAPE)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(10)
        with pytest.raises(IndexError):
            scheduler.step(x, 7, x)


def test_the_output_class():
    (ours, _), x = pair(NAME), torch.randn(SHAPE)
    ours.set_timesteps(5)
    result = ours.step(x, 0, x)
    assert type(result) is diffusers.schedulers.scheduling_ddpm.DDPMSchedulerOutput
    torch.testing.assert_close(result.pred_original_sample, ours.step(x, 0, x, return_dict=False)[1])
