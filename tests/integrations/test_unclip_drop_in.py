"""UnCLIPScheduler against diffusers at every step."""

from unittest.mock import patch

import pytest
import torch
from diffusers.schedulers import scheduling_unclip
from drop_in import SHAPE, assert_parity, network, pair, relative, with_variance

NAME = "UnCLIPScheduler"
VARIANCES = {"fixed_small_log": network, "learned_range": with_variance}
CONFIGS = {
    "defaults": {},
    "sample": {"prediction_type": "sample"},
    "unclipped": {"clip_sample": False},
    "clipped wide": {"clip_sample_range": 5.0},
}


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parity_of_single_timesteps(config, variance):
    for steps in (2, 7, 25):
        assert_parity(NAME, {**config, "variance_type": variance}, steps=steps, model=VARIANCES[variance])


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parity_between_timesteps(config, variance):
    """As the pipelines call it, with the next timestep given, none at the end; and with any two timesteps."""
    ours, theirs = pair(NAME, {**config, "variance_type": variance})
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(25)
    times = theirs.timesteps.tolist()
    run = [*zip(times, [*times[1:], None], strict=True)]
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    for time, before in [*run, (7, 6), (7, 0), (0, -3), (5, -1), (5, 9)]:
        results = []
        for scheduler in (theirs, ours):
            generator = torch.Generator().manual_seed(time)
            m = VARIANCES[variance](x, time)
            results.append(scheduler.step(m, time, x, before, generator, return_dict=False))
            assert generator.get_state().equal(torch.Generator().manual_seed(time).get_state()) is (time == 0)
        for their, our in zip(*results, strict=True):
            if not their.isnan().any():
                assert relative(our, their) < 1e-5, (time, before)
        x = results[0][0] if (time, before) in run else x


def test_embeddings():
    assert_parity(NAME, {"prediction_type": "sample", "clip_sample_range": 5.0}, steps=10, shape=(2, 16))


def test_it_gives_no_velocity_as_in_diffusers():
    ours, theirs = pair(NAME)
    assert not hasattr(theirs, "get_velocity")
    assert not hasattr(ours, "get_velocity")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half(dtype):
    """The truth is float32 with the noise that was drawn in half precision."""
    ours, theirs = pair(NAME)
    _, truth = pair(NAME)
    for scheduler in (ours, theirs, truth):
        scheduler.set_timesteps(10)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    drawn = scheduling_unclip.randn_tensor
    for t in truth.timesteps:
        m = network(x, t)
        with patch.object(
            scheduling_unclip,
            "randn_tensor",
            lambda shape, **options: drawn(shape, **{**options, "dtype": dtype}).float(),
        ):
            exact = truth.step(m.float(), t, x.float(), generator=torch.Generator().manual_seed(1), return_dict=False)
        results = [
            scheduler.step(m, t, x, generator=torch.Generator().manual_seed(1), return_dict=False)
            for scheduler in (theirs, ours)
        ]
        for true, their, our in zip(exact, *results, strict=True):
            assert our.dtype == their.dtype
            assert relative(our, true) <= 1.01 * relative(their, true) + 2.0**-23
        x = results[0][0]


def test_the_data_prediction_near_pure_noise():
    """At the first step x - sigma m cancels, and 1/alpha is 20000: the difference has to be taken first."""
    ours, theirs = pair(NAME)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(7)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(SHAPE, generator=generator)
        m = x * (1.0 + 1e-5 * torch.randn(SHAPE, generator=generator))
        results = [
            scheduler.step(m, scheduler.timesteps[0], x, generator=torch.Generator().manual_seed(seed))
            for scheduler in (ours, theirs)
        ]
        assert relative(results[0].pred_original_sample, results[1].pred_original_sample) < 1e-6
