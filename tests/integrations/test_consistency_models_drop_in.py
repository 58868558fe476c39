"""Consistency models against diffusers at every step."""

import pytest
import torch
from drop_in import assert_close_in_half, assert_parity, pair, relative

NAME = "CMStochasticIterativeScheduler"
CONFIGS = {
    "defaults": {},
    "unclipped": {"clip_denoised": False},
    "other ends": {"sigma_min": 0.01, "sigma_max": 60.0, "sigma_data": 0.7},
    "noise and rho": {"s_noise": 1.1, "rho": 4.0},
    "training": {"num_train_timesteps": 201},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parity(config):
    for steps in (1, 2, 7, 40):
        assert_parity(NAME, config, steps=steps)


@pytest.mark.parametrize("timesteps", [[22, 0], [39, 20, 3], [0]], ids=str)
def test_given_timesteps(timesteps):
    assert_parity(NAME, steps=None, set_options={"timesteps": timesteps})


@pytest.mark.parametrize("options", [{"begin": 3}, {"skip": 3}], ids=["set_begin_index", "the timestep alone"])
def test_from_the_middle(options):
    assert_parity(NAME, steps=10, **options)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7), (1, 4, 2, 6, 6)], ids=str)
def test_any_rank(shape):
    assert_parity(NAME, steps=3, shape=shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [{}, {"clip_denoised": False}], ids=["clipped", "unclipped"])
def test_half(config, dtype):
    assert_close_in_half(NAME, config, dtype)


def test_without_set_timesteps():
    """The training levels, the last of which ends its own step."""
    ours, theirs = pair(NAME)
    x, m = torch.randn(2, 2, 3, 8, 8)
    for t in theirs.timesteps:
        results = []
        for scheduler in (ours, theirs):
            scheduler.scale_model_input(x, t)
            results.append(scheduler.step(m, t, x, generator=torch.Generator()).prev_sample)
        assert relative(*results) < 1e-5


@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float32", "float16"), ("float16", "bfloat16")], ids=str)
def test_mixed_dtypes(dtypes):
    ours, theirs = pair(NAME)
    x, m = (torch.randn(2, 3, 8, 8).to(getattr(torch, dtype)) for dtype in dtypes)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(2)
    for t in theirs.timesteps:
        our, their = (s.step(m, t, x, generator=torch.Generator()).prev_sample for s in (ours, theirs))
        assert our.dtype == their.dtype == torch.float32
        # Theirs rounds to the dtype of the network's output on the way.
        assert relative(our, their) < 2.0**-8


@pytest.mark.parametrize("timestep", [3, torch.tensor(3)], ids=repr)
def test_an_index_is_refused(timestep):
    x = torch.zeros(1, 3, 4, 4)
    for scheduler in pair(NAME):
        scheduler.set_timesteps(5)
        with pytest.raises(ValueError, match="timesteps"):
            scheduler.step(x, timestep, x)
