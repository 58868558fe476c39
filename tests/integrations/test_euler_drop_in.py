"""Euler, Euler ancestral and EDM Euler against diffusers at every step."""

import math

import diffusers
import numpy as np
import pytest
import torch
from drop_in import SHAPE, assert_close_in_half, assert_parity, network, pair

EULER, ANCESTRAL, EDM = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "EDMEulerScheduler"
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIGS = {
    "defaults": {},
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "original_sample": {"prediction_type": "original_sample"},
    "latent leading": {**LATENT, "timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sigma_min": {"final_sigmas_type": "sigma_min"},
    "log_linear": {"interpolation_type": "log_linear"},
    "log_linear karras": {"interpolation_type": "log_linear", "use_karras_sigmas": True},
    "zero snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"},
    "continuous": {
        "timestep_type": "continuous",
        "prediction_type": "v_prediction",
        "use_karras_sigmas": True,
        "sigma_min": 0.002,
        "sigma_max": 700.0,
    },
    "trained betas": {"trained_betas": np.linspace(1e-4, 0.02, 100), "num_train_timesteps": 100},
}
EDM_CONFIGS = {
    "defaults": {},
    "v": {"prediction_type": "v_prediction"},
    "exponential": {"sigma_schedule": "exponential", "sigma_data": 1.0, "sigma_max": 20.0},
    "sigma_min": {"final_sigmas_type": "sigma_min"},
}
CHURN = {
    "churn": {"s_churn": 4.0},
    "most": {"s_churn": 100.0, "s_noise": 1.007},
    "bounds": {"s_churn": 5.0, "s_tmin": 0.05, "s_tmax": 5.0},
    "silent": {"s_churn": 5.0, "s_noise": 0.0},
    "negative": {"s_churn": -1.0},
}
MIDDLE = {"set_begin_index": {"begin": 5}, "the timestep alone": {"skip": 5}}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_euler_parity(config, steps):
    assert_parity(EULER, config, steps=steps)


@pytest.mark.parametrize("given", [{"timesteps": [900, 500, 40]}, {"sigmas": [14.6, 3.0, 0.5, 0.0]}], ids=str)
def test_euler_given_points(given):
    assert_parity(EULER, LATENT, steps=None, set_options=given)


@pytest.mark.parametrize("churn", CHURN.values(), ids=CHURN)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_euler_churn(churn, prediction):
    assert_parity(EULER, {"prediction_type": prediction, "interpolation_type": "log_linear"}, step_options=churn)
    assert_parity(EULER, {**LATENT, "prediction_type": prediction}, step_options=churn)


def test_a_bound_that_is_a_level_is_within():
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(10)
    sigmas = scheduler.sigmas.tolist()
    assert_parity(EULER, step_options={"s_churn": 5.0, "s_tmin": sigmas[6], "s_tmax": sigmas[2]})
    assert_parity(EULER, step_options={"s_churn": 5.0, "s_tmin": 0.0, "s_tmax": math.inf})


@pytest.mark.parametrize("name", [EULER, ANCESTRAL, EDM])
@pytest.mark.parametrize("options", MIDDLE.values(), ids=MIDDLE)
def test_from_the_middle(name, options):
    assert_parity(name, steps=20, **options)


@pytest.mark.parametrize("name", [EULER, ANCESTRAL, EDM])
@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 7), (1, 2, 3, 4, 5)], ids=str)
def test_any_rank(name, shape):
    assert_parity(name, steps=3, shape=shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "config", "churn"),
    [
        (EULER, {}, {}),
        (EULER, {"prediction_type": "v_prediction"}, {"s_churn": 4.0}),
        (EULER, {"prediction_type": "sample"}, {}),
        (ANCESTRAL, {}, {}),
        (EDM, {}, {"s_churn": 4.0}),
    ],
    ids=["euler", "euler v churn", "euler sample", "ancestral", "edm churn"],
)
def test_half(name, config, churn, dtype):
    assert_close_in_half(name, config, dtype, step_options=churn)


ANCESTRAL_CONFIGS = {key: CONFIGS[key] for key in ("defaults", "v", "latent leading", "trailing", "zero snr")}


@pytest.mark.parametrize("config", ANCESTRAL_CONFIGS.values(), ids=ANCESTRAL_CONFIGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_ancestral_parity(config, steps):
    assert_parity(ANCESTRAL, config, steps=steps)


@pytest.mark.parametrize("config", EDM_CONFIGS.values(), ids=EDM_CONFIGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_edm_parity(config, steps):
    assert_parity(EDM, config, steps=steps)


@pytest.mark.parametrize("churn", CHURN.values(), ids=CHURN)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_churn(churn, prediction):
    assert_parity(EDM, {"prediction_type": prediction}, step_options=churn)


@pytest.mark.parametrize("churn", [{}, {"s_churn": 4.0}], ids=["plain", "churn"])
def test_edm_with_a_given_data_prediction(churn):
    data = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    assert_parity(EDM, {"prediction_type": "v_prediction"}, step_options={**churn, "pred_original_sample": data})


@pytest.mark.parametrize("name", [EULER, ANCESTRAL, EDM])
def test_what_diffusers_refuses(name):
    for scheduler in pair(name):
        scheduler.set_timesteps(5)
        x = torch.zeros(SHAPE)
        for timestep in (1, torch.tensor(1), torch.tensor(1, dtype=torch.int32)):
            with pytest.raises(ValueError, match="integer"):
                scheduler.step(x, timestep, x)


def test_an_unfinished_prediction():
    for scheduler in pair(ANCESTRAL, {"prediction_type": "sample"}):
        scheduler.set_timesteps(5)
        x = torch.zeros(SHAPE)
        with pytest.raises(NotImplementedError, match="not implemented"):
            scheduler.step(x, scheduler.timesteps[0], x)


@pytest.mark.parametrize("name", [EULER, EDM])
def test_tables_are_made_once_for_each_churn(name, monkeypatch):
    scheduler = pair(name)[0]
    scheduler.set_timesteps(10)
    begun = []
    begin = type(scheduler)._begin
    monkeypatch.setattr(type(scheduler), "_begin", lambda self, index: begun.append(index) or begin(self, index))
    x = torch.ones(SHAPE)
    for t in scheduler.timesteps:
        scheduler.scale_model_input(x, t)
        scheduler.step(network(x, t), t, x, s_churn=3.0)
    assert begun == [0]


def test_a_missing_scale_model_input_is_told(monkeypatch):
    for scheduler, module in zip(pair(EULER), [diffusers.schedulers.scheduling_euler_discrete] * 2, strict=True):
        told = []
        monkeypatch.setattr(module.logger, "warning", told.append)
        scheduler.set_timesteps(5)
        x = torch.zeros(SHAPE)
        scheduler.step(x, scheduler.timesteps[0], x)
        scheduler.scale_model_input(x, scheduler.timesteps[1])
        scheduler.step(x, scheduler.timesteps[1], x)
        assert len(told) == 1
