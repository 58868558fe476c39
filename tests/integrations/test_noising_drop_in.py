"""`add_noise` and `scale_noise` against diffusers: every way in which a level is found, forms, dtypes and shapes."""

import pytest
import torch
from drop_in import network, relative
from drop_in import pair as pair_of
from drop_in import start as state_at_start
from waiting import on_device, the_device_is_not_read

import fastdiff.integrations.diffusers as drop_in
from fastdiff import ops
from fastdiff.integrations.diffusers.alphas_cumprod import Noising
from fastdiff.integrations.diffusers.noising import AddNoise, ScaleNoise

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
CONFIGS = {
    "EulerDiscreteScheduler": ({"use_karras_sigmas": True},),
    "DPMSolverMultistepScheduler": (FLOW, {"rescale_betas_zero_snr": True}),
    "DPMSolverSinglestepScheduler": (FLOW,),
    "DEISMultistepScheduler": (FLOW,),
    "UniPCMultistepScheduler": (FLOW,),
    "HeunDiscreteScheduler": ({"use_exponential_sigmas": True},),
    "FlowMatchEulerDiscreteScheduler": ({"shift": 3.0},),
}
CLASSES = {name: getattr(drop_in, name) for name in drop_in.__all__}
NAMES = [name for name, kind in CLASSES.items() if issubclass(kind, AddNoise | ScaleNoise)]
# By a level for each timestep, which the training schedule has (test_add_noise_drop_in.py); refused; or diffusers' own.
OTHERWISE = {"RePaintScheduler", "ScoreSdeVeScheduler", "DPMSolverMultistepInverseScheduler"}
OTHERWISE |= {name for name, kind in CLASSES.items() if issubclass(kind, Noising)}
SHAPE = (3, 4, 6, 6)
PICKS = {
    "a slice": lambda times: times[2:5],
    "every second": lambda times: times[1:6:2],
    "one": lambda times: times[4:5],
    "one for each": lambda times: times[4:5].expand(3),
    "a copy": lambda times: times[4:5].repeat(3),
    "any": lambda times: times[torch.tensor([7, 0, 3])],
    "float64": lambda times: times[1:4].double(),
}
cases = pytest.mark.parametrize(
    ("name", "config"), [(name, config) for name in NAMES for config in ({}, *CONFIGS.get(name, ()))], ids=str
)


def test_every_class_is_here():
    assert {name for name, kind in CLASSES.items() if hasattr(kind, "add_noise")} - OTHERWISE <= set(NAMES)


def noised(scheduler, x, noise, timesteps):
    name = "scale_noise" if hasattr(scheduler, "scale_noise") else "add_noise"
    first = (x, timesteps, noise) if name == "scale_noise" else (x, noise, timesteps)
    return getattr(scheduler, name)(*first)


def pair(name, config, steps=10):
    both = pair_of(name, config)
    for scheduler in both:
        scheduler.set_timesteps(steps)
    return both


def fused(function, *args):
    """The result, and whether the operator made it."""
    ops.report(reset=True)
    result = function(*args)
    return result, any(name == "add_noise" for name, _ in ops.report().calls)


@cases
@pytest.mark.parametrize("start", ["unknown", "begin index", "begun"])
@pytest.mark.parametrize("pick", PICKS)
def test_parity(name, config, pick, start):
    x, noise = torch.randn(2, *SHAPE)
    results = []
    for scheduler in pair(name, config):
        if start != "unknown":
            scheduler.set_begin_index(3)
        if start == "begun":
            scheduler._step_index = 6
        results.append(fused(noised, scheduler, x, noise, PICKS[pick](scheduler.timesteps)))
    (our, by_operator), (their, _) = results
    assert by_operator
    assert our.dtype == their.dtype
    assert relative(our, their) < 1e-6


@cases
def test_before_set_timesteps(name, config):
    """As in training: all training timesteps."""
    schedulers = pair_of(name, config)
    x, noise = torch.randn(2, *SHAPE)
    times = schedulers[1].timesteps[torch.tensor([30, 2, 17])]
    our, their = (noised(scheduler, x, noise, times) for scheduler in schedulers)
    assert relative(our, their) < 1e-6


@cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half(name, config, dtype):
    x, noise = torch.randn(2, *SHAPE).to(dtype)
    schedulers = pair(name, config)
    times = schedulers[0].timesteps[5:8]
    (our, by_operator), (their, _) = (fused(noised, scheduler, x, noise, times) for scheduler in schedulers)
    truth = noised(schedulers[1], x.float(), noise.float(), times)
    assert by_operator
    assert our.dtype == their.dtype == dtype
    assert relative(our, truth) <= 1.01 * relative(their, truth)


@cases
@pytest.mark.parametrize("shape", [(3,), (3, 5), (3, 2, 7), (3, 4, 2, 6, 6)], ids=str)
def test_any_rank(name, config, shape):
    x, noise = torch.randn(2, *shape)
    schedulers = pair(name, config)
    our, their = (noised(scheduler, x, noise, scheduler.timesteps[3:6]) for scheduler in schedulers)
    assert our.shape == their.shape
    assert relative(our, their) < 1e-6


OTHERS = {
    "one sample, many levels": (torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)),
    "noise for all": (torch.randn(3, 2, 4, 4), torch.randn(1, 2, 4, 4)),
    "wider noise": (torch.randn(3, 2, 4, 4).half(), torch.randn(3, 2, 4, 4)),
    "two halves": (torch.randn(3, 2, 4, 4).half(), torch.randn(3, 2, 4, 4).bfloat16()),
    "float64": (torch.randn(3, 2, 4, 4).double(), torch.randn(3, 2, 4, 4).double()),
    "gradients": (torch.randn(3, 2, 4, 4, requires_grad=True), torch.randn(3, 2, 4, 4)),
}


@cases
@pytest.mark.parametrize("tensors", OTHERS.values(), ids=OTHERS)
def test_what_the_operator_does_not_do_is_theirs(name, config, tensors):
    (our, by_operator), (their, _) = (
        fused(noised, scheduler, *tensors, scheduler.timesteps[3:6]) for scheduler in pair(name, config)
    )
    assert not by_operator
    assert our.dtype == their.dtype
    assert torch.equal(our, their)
    assert our.requires_grad == their.requires_grad


@cases
def test_narrower_noise(name, config):
    x, noise = torch.randn(SHAPE), torch.randn(SHAPE).half()
    our, their = (noised(scheduler, x, noise, scheduler.timesteps[3:6]) for scheduler in pair(name, config))
    assert our.dtype == their.dtype == torch.float32
    assert relative(our, their) < 1e-6


@cases
def test_a_timestep_that_is_none_of_theirs(name, config):
    """Multistep classes take the last one for it, the others refuse it."""
    schedulers, x = pair(name, config), torch.randn(SHAPE)
    times = torch.tensor([123.4, 5.6, 7.8])
    if "Multistep" in name or "Singlestep" in name:
        our, their = (noised(scheduler, x, x, times) for scheduler in schedulers)
        assert relative(our, their) < 1e-6
        return
    for scheduler in schedulers:
        with pytest.raises(IndexError):
            noised(scheduler, x, x, times)


@cases
@pytest.mark.parametrize("begin", [None, 2], ids=["", "begin index"])
def test_between_steps(name, config, begin):
    """As in inpainting: at the level that is due, or looked up; the steps go on as they would have."""
    image, noise = torch.randn(2, *SHAPE)
    both, first = pair(name, config), begin or 0
    x = state_at_start(both[1], SHAPE, torch.float32)
    for scheduler in both:
        if begin is not None:
            scheduler.set_begin_index(begin)
    for index in range(first, first + 4):
        results = []
        for scheduler in both:
            t = scheduler.timesteps[index]
            y = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            torch.default_generator.manual_seed(index)
            moved = scheduler.step(network(y, t), t, x, return_dict=False)[0]
            results.append((moved, noised(scheduler, image, noise, scheduler.timesteps[index + 1 : index + 2])))
        (our, our_noised), (their, their_noised) = results[0], results[1]
        assert relative(our, their) < 1e-5
        assert relative(our_noised, their_noised) < 1e-6
        x = their


@cases
@pytest.mark.parametrize("begin", [None, 3], ids=["", "begin index"])
@pytest.mark.parametrize("pick", ["a slice", "one", "one for each"])
def test_nothing_waits(name, config, pick, begin):
    scheduler, _ = pair(name, config)
    if begin is not None:
        scheduler.set_begin_index(begin)
    x, noise = torch.randn(2, *SHAPE)
    expected = noised(scheduler, x, noise, PICKS[pick](scheduler.timesteps))
    scheduler.timesteps = on_device(scheduler.timesteps)
    with the_device_is_not_read():
        found = noised(scheduler, on_device(x), on_device(noise), PICKS[pick](scheduler.timesteps))
    assert torch.equal(found.as_subclass(torch.Tensor), expected)


def test_a_level_that_stands_twice():
    """The second of them, as for a run that starts there."""
    both = pair_of("FlowMatchEulerDiscreteScheduler")
    for scheduler in both:
        scheduler.set_timesteps(sigmas=[0.9, 0.5, 0.3, 0.1], timesteps=[900.0, 500.0, 500.0, 100.0])
    x, noise = torch.randn(2, *SHAPE)
    for pick in (slice(1, 2), slice(2, 3), slice(0, 3)):
        our, their = (scheduler.scale_noise(x, scheduler.timesteps[pick], noise) for scheduler in both)
        assert relative(our, their) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_flow_heun(dtype):
    """One level for all samples: that of the timestep at first, then that of the step which is due."""
    both = pair("FlowMatchHeunDiscreteScheduler", {})
    x, noise = torch.randn(2, *SHAPE).to(dtype)
    for time in (both[1].timesteps[3], both[1].timesteps[5]):
        (our, by_operator), (their, _) = (fused(scheduler.scale_noise, x, time, noise) for scheduler in both)
        assert by_operator
        assert our.dtype == their.dtype
        assert both[0].step_index == both[1].step_index == 4
        assert relative(our, their) < (1e-6 if dtype == torch.float32 else 1e-3)
