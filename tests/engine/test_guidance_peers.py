"""Guidance rescale and dynamic thresholds in a whole run, beside diffusers' own functions and schedulers."""

import diffusers
import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from diffusers_peer import IN_FLOAT64, network, relative, schedule_of, scheduler_for, table_for

import fastdiff
from fastdiff import Guidance, ops
from fastdiff.noise import STREAM_INITIAL, STREAM_STEP, seed_tensor

SHAPE = (3, 2, 9, 7)
SEEDS = [4, 9, -2]
STEPS = 6
SIZES = torch.tensor([1.0, 2.0, 4.0]).reshape(-1, 1, 1, 1)


def noise(stream: int, step: int = 0) -> torch.Tensor:
    return ops.philox_normal(seed_tensor(SEEDS), SHAPE, stream=stream, step=step)


def states(table, denoiser, **options) -> list[torch.Tensor]:
    """The state after each step of our run."""
    found: list[torch.Tensor] = []
    fastdiff.run(denoiser, table, shape=SHAPE, seeds=SEEDS, callback=lambda info: found.append(info.x), **options)
    return found


@pytest.mark.parametrize("rescale", [0.7, 1.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("method", ["ddim", "euler", "dpmpp_2m"])
def test_rescale_as_in_diffusers(method, prediction, rescale):
    """Guidance(scale, rescale) is what their pipelines make of the two outputs before scheduler.step."""
    options = {"clip_sample": False} if method == "ddim" else {}
    scheduler = scheduler_for(method, "linear", prediction, **options)
    scheduler.set_timesteps(STEPS)
    table = table_for(method, scheduler, prediction, STEPS, clip=None)
    schedule = schedule_of(scheduler)

    def outputs(x, t):
        uncond = network(schedule, prediction, x, t)
        return uncond, uncond + 0.3 * SIZES * torch.sin(2.0 * x)

    def denoiser(x, t):
        uncond, cond = x.chunk(2)
        return torch.cat([outputs(uncond, float(t[0]))[0], outputs(cond, float(t[0]))[1]])

    # Theirs starts from our own state each time: only one step's rounding is compared.
    found = states(table, denoiser, guidance=Guidance(scale=4.0, rescale=rescale))
    x = table.init_scale * noise(STREAM_INITIAL)
    for t, state in zip(scheduler.timesteps, found, strict=True):
        given = scheduler.scale_model_input(x, t)
        uncond, cond = outputs(given, float(t))
        m = rescale_noise_cfg(uncond + 4.0 * (cond - uncond), cond, guidance_rescale=rescale)
        assert relative(state, scheduler.step(m, t, x).prev_sample) < 1e-5
        x = state


@pytest.mark.parametrize("maximum", [1.5, 100.0])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("method", ["ddpm", "ddim", "dpmpp_2m", "unipc"])
def test_dynamic_threshold_as_in_diffusers(method, prediction, maximum, monkeypatch):
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": maximum}
    if method in ("ddpm", "ddim"):
        config["clip_sample"] = False
    scheduler = scheduler_for(method, "linear", prediction, **config)
    scheduler.set_timesteps(STEPS)
    if method in IN_FLOAT64:
        scheduler.sigmas = scheduler.sigmas.double()
    threshold = {"clip": None, "dynamic_threshold": 0.9, "dynamic_maximum": maximum}
    table = table_for(method, scheduler, prediction, STEPS, **threshold)
    schedule = schedule_of(scheduler)

    def denoiser(x, t):
        return SIZES * network(schedule, prediction, x, float(t.reshape(-1)[0]))

    found = states(table, denoiser)
    drawn = iter(range(STEPS))
    if method == "ddpm":
        module = diffusers.schedulers.scheduling_ddpm
        monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise(STREAM_STEP, next(drawn)))
    x = table.init_scale * noise(STREAM_INITIAL)
    for t, state in zip(scheduler.timesteps, found, strict=True):
        theirs = scheduler.step(denoiser(x, t), t, x).prev_sample
        assert relative(state, theirs) < 1e-5
        x = state
    assert float(found[-1].abs().max()) <= 1.0 + 1e-6
