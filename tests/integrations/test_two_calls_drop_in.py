"""Heun, the midpoint methods and the stochastic DPM-Solver++ of k-diffusion against diffusers at every call."""

import inspect

import numpy as np
import pytest
import torch
from drop_in import SHAPE, assert_close_in_half, assert_parity, network, pair, relative

HEUN, DPM2, ANCESTRAL, SDE = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)
NAMES = (HEUN, DPM2, ANCESTRAL, SDE)
# Their constructors place every training timestep one by one, so there are few, down to the usual noise.
FEW = {"num_train_timesteps": 100, "beta_start": 0.001, "beta_end": 0.12}
BASES = {name: {**FEW, **({"noise_sampler_seed": 3} if name == SDE else {})} for name in NAMES}
CONFIGS = {
    "defaults": {},
    "v": {"prediction_type": "v_prediction"},
    "scaled_linear leading": {"beta_schedule": "scaled_linear", "timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True, "prediction_type": "v_prediction"},
    "beta": {"use_beta_sigmas": True},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained betas": {"trained_betas": np.linspace(1e-3, 0.15, 100)},
}
HEUN_CONFIGS = {
    "sample": {"prediction_type": "sample"},
    "clip": {"clip_sample": True},
    "clip v": {"clip_sample": True, "clip_sample_range": 2.0, "prediction_type": "v_prediction"},
    "clip sample": {"clip_sample": True, "prediction_type": "sample"},
    "exp": {"beta_schedule": "exp"},
}
CASES = [(name, key, config) for name in NAMES for key, config in CONFIGS.items()]
CASES += [(HEUN, key, config) for key, config in HEUN_CONFIGS.items()]
IDS = [f"{name[:-9]} {key}" for name, key, _ in CASES]
MIDDLE = [(name, options) for name in NAMES for options in ({"begin": 6}, {"skip": 6})]
# Between the two calls of a step, where the others of diffusers' give NaN.
MIDDLE += [(HEUN, {"begin": 5}), (DPM2, {"begin": 5}), (DPM2, {"skip": 5})]


@pytest.mark.parametrize(("name", "key", "config"), CASES, ids=IDS)
def test_two_call_parity(name, key, config):
    for steps in (1, 2, 7, 20):
        if (name, key) == (ANCESTRAL, "cosine") and steps in (2, 7):
            continue  # diffusers' own levels are NaN there
        assert_parity(name, {**BASES[name], **config}, steps=steps)


@pytest.mark.parametrize(("name", "options"), MIDDLE, ids=str)
def test_two_calls_from_the_middle(name, options):
    assert_parity(name, BASES[name], steps=10, **options)


@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 7), (1, 2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_two_calls_of_any_rank(name, shape):
    assert_parity(name, BASES[name], steps=3, shape=shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [HEUN, DPM2, ANCESTRAL])
def test_two_calls_half(name, dtype):
    assert_close_in_half(name, BASES[name], dtype)


@pytest.mark.parametrize("config", [{"prediction_type": "sample"}, {"clip_sample": True}], ids=str)
def test_heun_half(config):
    assert_close_in_half(HEUN, {**FEW, **config}, torch.float16)


@pytest.mark.parametrize("s_noise", [0.0, 0.7, 1.3, 20.0, -1.0])
def test_sde_noise_scale(s_noise):
    assert_parity(SDE, BASES[SDE], step_options={"s_noise": s_noise})


def test_sde_noise_scale_of_each_call():
    pairs, x = pair(SDE, BASES[SDE]), torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    results = []
    for scheduler in pairs:
        scheduler.set_timesteps(5)
        state = x * scheduler.init_noise_sigma
        for index, t in enumerate(scheduler.timesteps):
            m = network(scheduler.scale_model_input(state, t), t)
            state = scheduler.step(m, t, state, s_noise=1.0 + 0.1 * (index % 3)).prev_sample
        results.append(state)
    assert relative(*results) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_public_state_is_that_of_diffusers(name):
    ours, theirs = pair(name, BASES[name])
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    takes = "generator" in inspect.signature(theirs.step).parameters
    for t in theirs.timesteps:
        for scheduler in (ours, theirs):
            given = {"generator": torch.Generator().manual_seed(1)} if takes else {}
            scheduler.step(0.5 * x, t, x, **given)
        assert ours.state_in_first_order == theirs.state_in_first_order
        for field in ("sample", "dt", "prev_derivative", "mid_point_sigma"):
            their, our = getattr(theirs, field, None), getattr(ours, field, None)
            assert (our is None) == (their is None), field
            assert their is None or relative(torch.as_tensor(our), torch.as_tensor(their)) < 1e-5, field


@pytest.mark.parametrize("factor", [0.0, 1e-3])
def test_slope_of_a_state_that_is_large_beside_it(factor):
    """It is diffusers' own quotient, digit for digit, as is the length of the step."""
    x = 1e4 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    ours, theirs = pair(HEUN, {**BASES[HEUN], "prediction_type": "epsilon"})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
        scheduler.step(factor * torch.ones(SHAPE), scheduler.timesteps[0], x)
    assert torch.is_tensor(ours.dt)
    assert torch.equal(ours.dt, theirs.dt)
    error = (ours.prev_derivative - theirs.prev_derivative).norm()
    assert error <= 1e-5 * theirs.prev_derivative.norm()


@pytest.mark.parametrize("name", NAMES)
def test_diffusers_can_finish_a_step_of_ours(name):
    """A second call with a shape that no row takes is diffusers' own, from what our first call left."""
    x, results = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)), []
    for scheduler in pair(name, BASES[name]):
        scheduler.set_timesteps(4)
        given = {"generator": torch.Generator().manual_seed(1)} if name == ANCESTRAL else {}
        first = scheduler.step(0.5 * x, scheduler.timesteps[0], x, **given).prev_sample
        results.append(scheduler.step(0.5 * x[:, :1], scheduler.timesteps[1], first, **given).prev_sample)
    assert relative(*results) < 1e-5


@pytest.mark.parametrize("name", [DPM2, ANCESTRAL, SDE])
def test_two_calls_unfinished_prediction(name):
    for scheduler in pair(name, {**FEW, "prediction_type": "sample"}):
        scheduler.set_timesteps(5)
        x = torch.zeros(SHAPE)
        with pytest.raises(NotImplementedError, match="not implemented"):
            scheduler.step(x, scheduler.timesteps[0], x)
