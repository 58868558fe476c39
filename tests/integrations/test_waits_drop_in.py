"""No step of a drop-in scheduler reads a number out of a tensor, which on a GPU would wait for it."""

import inspect

import pytest
import torch
from drop_in import SHAPE, network, pair
from torch.utils._python_dispatch import TorchDispatchMode

CASES = {
    "euler": ("EulerDiscreteScheduler", {}, {}),
    "euler churn": ("EulerDiscreteScheduler", {}, {"s_churn": 4.0}),
    "ancestral": ("EulerAncestralDiscreteScheduler", {}, {}),
    "edm": ("EDMEulerScheduler", {}, {"s_churn": 4.0}),
    "heun": ("HeunDiscreteScheduler", {}, {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}, {}),
    "dpm2 ancestral": ("KDPM2AncestralDiscreteScheduler", {}, {}),
    "lms": ("LMSDiscreteScheduler", {}, {}),
    "pndm": ("PNDMScheduler", {}, {}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}, {}),
    "ipndm": ("IPNDMScheduler", {}, {}),
}
WAITS = ("_local_scalar_dense", "nonzero", "item", "is_nonzero")


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket.__name__ not in WAITS, f"{function} reads a tensor"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("start", [0, 6])
@pytest.mark.parametrize(("name", "config", "options"), CASES.values(), ids=CASES)
def test_no_step_waits(name, config, options, start):
    scheduler = pair(name, config)[0]
    scheduler.set_timesteps(10)
    x = torch.randn(SHAPE)
    takes = "generator" in inspect.signature(scheduler.step).parameters
    given = {**options, **({"generator": torch.Generator()} if takes else {})}
    for t in scheduler.timesteps[start:]:
        with NoWaiting():
            m = network(scheduler.scale_model_input(x, t), t)
            x = scheduler.step(m, t, x, **given, return_dict=False)[0]
    assert torch.isfinite(x).all()
