"""The classes that look timesteps up: no step is left to diffusers, none waits, and what else goes with them."""

import copy
import pickle

import diffusers
import pytest
import torch
from drop_in import SHAPE, pair, relative
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff.integrations.diffusers as drop_in

NAMES = ("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler", "UnCLIPScheduler", "LCMScheduler", "TCDScheduler")
CASES = {
    "ddpm": ("DDPMScheduler", {}, {}),
    "ddpm, learned": ("DDPMScheduler", {"variance_type": "learned"}, {}),
    "ddpm, learned range": ("DDPMScheduler", {"variance_type": "learned_range"}, {}),
    "ddpm, threshold": ("DDPMScheduler", {"thresholding": True}, {}),
    "ddpm, zero snr": ("DDPMScheduler", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, {}),
    "ddim": ("DDIMScheduler", {}, {}),
    "ddim, eta": ("DDIMScheduler", {"timestep_spacing": "trailing"}, {"eta": 1.0, "use_clipped_model_output": True}),
    "ddim inverse": ("DDIMInverseScheduler", {}, {}),
    "unclip": ("UnCLIPScheduler", {}, {}),
    "unclip, learned range": ("UnCLIPScheduler", {"variance_type": "learned_range"}, {}),
    "unclip, next given": ("UnCLIPScheduler", {}, {"prev_timestep": 0}),
    "lcm": ("LCMScheduler", {"clip_sample": True}, {}),
    "tcd": ("TCDScheduler", {}, {"eta": 0.7}),
    "repaint": (
        "RePaintScheduler",
        {"eta": 1.0},
        {"original_image": torch.ones(SHAPE), "mask": torch.ones(1, 1, 8, 8)},
    ),
}


class NoWaiting(TorchDispatchMode):
    """Refuses what reads a tensor's value, which a device would have to be waited for."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")
        assert not any(name in str(function) for name in waits), f"{function} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("name", "config", "options"), CASES.values(), ids=CASES)
def test_no_step_is_left_to_diffusers_and_none_waits(monkeypatch, name, config, options):
    scheduler = getattr(drop_in, name)(**config)
    scheduler.set_timesteps(12)
    monkeypatch.setattr(getattr(diffusers, name), "step", None)
    x = torch.randn(SHAPE)
    m = torch.randn(SHAPE).repeat(1, 2 if "learned" in str(config) else 1, 1, 1)
    with NoWaiting():
        for t in scheduler.timesteps:
            scheduler.step(m, t, x, **options)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_the_step_without_signal_alone_is_left_to_diffusers(monkeypatch, name):
    """epsilon says nothing of the data there: diffusers divides by zero, and clips."""
    scheduler = getattr(drop_in, name)(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    scheduler.set_timesteps(5)
    monkeypatch.setattr(getattr(diffusers, name), "step", None)
    x = torch.randn(SHAPE)
    with pytest.raises(TypeError):
        scheduler.step(x, scheduler.timesteps[0], x)
    for t in scheduler.timesteps[1:]:
        scheduler.step(x, t, x)
    assert max(len(found.rows) for found in scheduler._lookups.values()) == 4


@pytest.mark.parametrize("name", NAMES)
def test_gradients(name):
    ours, theirs = pair(name)
    gradients = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(6)
        generator = torch.Generator().manual_seed(0)
        x, m = (torch.randn(SHAPE, generator=generator).requires_grad_() for _ in range(2))
        torch.manual_seed(0)
        result = scheduler.step(m, scheduler.timesteps[2], x, return_dict=False)
        (result[0].square().sum() + result[1].sum()).backward()
        gradients.append((x.grad, m.grad))
    for our, their in zip(*gradients, strict=True):
        assert relative(our, their) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_copies_go_on_alike(name):
    scheduler = getattr(drop_in, name)()
    scheduler.set_timesteps(6)
    x = torch.randn(SHAPE)
    scheduler.step(x, scheduler.timesteps[0], x)
    results = []
    for other in (scheduler, copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        torch.manual_seed(0)
        results.append(other.step(0.5 * x, other.timesteps[1], x).prev_sample)
    torch.testing.assert_close(results[1], results[0], rtol=0.0, atol=0.0)
    torch.testing.assert_close(results[2], results[0], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("name", [*NAMES, "RePaintScheduler"])
def test_saved_and_loaded(name, tmp_path):
    getattr(drop_in, name)(beta_schedule="squaredcos_cap_v2", num_train_timesteps=500).save_pretrained(tmp_path)
    loaded = getattr(drop_in, name).from_pretrained(tmp_path)
    assert type(loaded) is getattr(drop_in, name)
    assert type(loaded).__name__ == name
    assert loaded.config.num_train_timesteps == len(loaded.alphas_cumprod) == 500
