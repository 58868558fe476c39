"""Flow matching against diffusers at every step."""

import contextlib

import pytest
import torch
from drop_in import assert_close_in_half, assert_parity, pair, relative
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from fastdiff.ops import native

EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
DYNAMIC = {"use_dynamic_shifting": True}
STOCHASTIC = {"stochastic_sampling": True}
CONFIGS = {
    "defaults": ({}, {}),
    "shift": ({"shift": 3.0, "num_train_timesteps": 200}, {}),
    "dynamic": (DYNAMIC, {"mu": 0.8}),
    "dynamic linear": ({**DYNAMIC, "time_shift_type": "linear"}, {"mu": 1.7}),
    "terminal": ({**DYNAMIC, "shift_terminal": 0.1}, {"mu": 1.2}),
    "karras": ({"use_karras_sigmas": True}, {}),
    "exponential": ({"use_exponential_sigmas": True}, {}),
    "beta": ({"use_beta_sigmas": True, "shift": 2.0}, {}),
    "inverted": ({"invert_sigmas": True}, {}),
    "stochastic": (STOCHASTIC, {}),
    "stochastic inverted": ({**STOCHASTIC, "invert_sigmas": True}, {}),
    "stochastic dynamic": ({**STOCHASTIC, **DYNAMIC}, {"mu": 0.4}),
}
CHURNS = {
    "none": {},
    "everywhere": {"s_churn": 5.0},
    "clamped": {"s_churn": 90.0, "s_noise": 1.1},
    "between": {"s_churn": 20.0, "s_tmin": 0.3, "s_tmax": 0.8, "s_noise": 0.9},
    "without noise": {"s_churn": 3.0, "s_noise": 0.0},
}
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.mark.parametrize(("config", "calls"), CONFIGS.values(), ids=CONFIGS)
def test_euler_parity(config, calls):
    # One level that is stretched to a terminal one is 0 / 0.
    for steps in (2, 7, 20) if "shift_terminal" in config else (1, 2, 7, 20):
        assert_parity(EULER, config, steps=steps, set_options=calls)


@pytest.mark.parametrize(
    "given",
    [
        {"sigmas": [1.0, 0.7, 0.31, 0.05]},
        {"timesteps": [900.0, 500.0, 20.0]},
        {"sigmas": [0.9, 0.5, 0.1], "timesteps": [800.0, 801.5, 3.0]},
        {"sigmas": [0.9, 0.5, 0.5, 0.1]},
    ],
    ids=["sigmas", "timesteps", "both", "a level twice"],
)
def test_euler_with_points_of_the_callers(given):
    for config in ({}, {"shift": 3.0}, STOCHASTIC):
        assert_parity(EULER, config, steps=None, set_options=given)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7), (1, 4, 2, 6, 6)], ids=str)
@pytest.mark.parametrize("name", [EULER, HEUN])
def test_any_rank(name, shape):
    assert_parity(name, steps=3, shape=shape)


@pytest.mark.parametrize("options", [{"begin": 6}, {"skip": 6}], ids=["set_begin_index", "the timestep alone"])
@pytest.mark.parametrize("config", [{}, STOCHASTIC], ids=["plain", "stochastic"])
def test_euler_from_the_middle(config, options):
    assert_parity(EULER, config, steps=20, **options)


def test_arguments_that_change_nothing():
    assert_parity(EULER, steps=5, step_options={"s_churn": 9.0, "s_tmin": 0.1, "s_tmax": 0.9, "s_noise": 3.0})


@HALVES
@pytest.mark.parametrize("config", [{}, {"shift": 3.0}, STOCHASTIC], ids=["plain", "shift", "stochastic"])
def test_euler_half(config, dtype):
    assert_close_in_half(EULER, config, dtype)


def test_set_shift():
    for scheduler in (schedulers := pair(EULER)):
        scheduler.set_shift(5.0)
        scheduler.set_timesteps(4)
    ours, theirs = schedulers
    x, m = torch.randn(2, 2, 3, 8, 8)
    for t in theirs.timesteps:
        assert relative(ours.step(m, t, x).prev_sample, theirs.step(m, t, x).prev_sample) < 1e-6


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("churn", CHURNS.values(), ids=CHURNS)
def test_heun_parity(churn, steps):
    for config in ({}, {"shift": 3.0}):
        assert_parity(HEUN, config, steps=steps, step_options=churn)


@pytest.mark.parametrize("steps", [2, 5])
def test_a_long_step_to_a_small_level(steps):
    """Theirs loses digits of the network's output there, and ours the same."""
    ours, theirs = pair(HEUN)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    x, m = torch.randn(2, 2, 3, 16, 16)
    for t in theirs.timesteps:
        our, their = (scheduler.step(m, t, x).prev_sample for scheduler in (ours, theirs))
        assert relative(our, their) < 2e-7
        x = their


@pytest.mark.parametrize("name", [EULER, HEUN])
def test_many_steps(name):
    assert_parity(name, steps=999, shape=(1, 2, 3, 3))


@pytest.mark.parametrize("options", [{"begin": 4}, {"begin": 5}, {"skip": 4}], ids=["first call", "second", "skip"])
@pytest.mark.parametrize("churn", [{}, {"s_churn": 5.0}], ids=["plain", "churn"])
def test_heun_from_the_middle(churn, options):
    assert_parity(HEUN, steps=12, step_options=churn, **options)


@HALVES
def test_heun_half(dtype):
    for steps in (2, 10):
        assert_close_in_half(HEUN, {}, dtype, steps=steps)
        assert_close_in_half(HEUN, {}, dtype, steps=steps, step_options={"s_churn": 20.0})


def test_churn_may_change_between_calls():
    """That of a step's first call counts; the second draws by its own."""
    churns = [{}, {"s_churn": 9.0}, {"s_churn": 9.0}, {}, {"s_churn": 4.0}, {"s_churn": 90.0, "s_tmin": 0.5}, {}]
    ours, theirs = pair(HEUN)
    generators = torch.Generator(), torch.Generator()
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    x, m = torch.randn(2, 2, 3, 8, 8)
    for t, churn in zip(theirs.timesteps, churns, strict=True):
        results = []
        for scheduler, generator in zip((ours, theirs), generators, strict=True):
            results.append(scheduler.step(m, t, x, generator=generator, **churn).prev_sample)
        assert ours.state_in_first_order == theirs.state_in_first_order
        assert relative(*results) < 1e-5
        assert generators[0].get_state().equal(generators[1].get_state())
        x = results[1]


def test_a_timestep_for_each_token():
    ours, theirs = pair(EULER)
    x, m = torch.randn(2, 2, 6, 5)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(8)
    tokens = theirs.timesteps[torch.tensor([[0, 3, 7, 2, 2, 5]] * 2)]
    for t in theirs.timesteps[:2]:
        results = [s.step(m, t, x, per_token_timesteps=tokens, return_dict=False)[0] for s in (ours, theirs)]
        assert torch.equal(*results)
        assert ours.step_index == theirs.step_index


@pytest.mark.parametrize("name", [EULER, HEUN])
@pytest.mark.parametrize("dtypes", [("float16", "float32"), ("float32", "bfloat16"), ("float64", "float64")], ids=str)
def test_mixed_dtypes(name, dtypes):
    """float32 inside, and out comes the dtype of the network's output."""
    ours, theirs = pair(name)
    x, m = (torch.randn(2, 3, 8, 8).to(getattr(torch, dtype)) for dtype in dtypes)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    for t in theirs.timesteps:
        our, their = (scheduler.step(m, t, x).prev_sample for scheduler in (ours, theirs))
        assert our.dtype == their.dtype == m.dtype
        assert relative(our, their) < (1e-5 if m.dtype != torch.bfloat16 else 4e-3)


@pytest.mark.parametrize("name", [EULER, HEUN])
def test_gradients(name):
    ours, theirs = pair(name)
    results = []
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(3)
        x = torch.ones(2, 3, 4, 4, requires_grad=True)
        y = x
        for t in scheduler.timesteps:
            y = scheduler.step(torch.sin(y), t, y).prev_sample
        y.square().sum().backward()
        results.append(x.grad)
    assert relative(*results) < 1e-5


@pytest.mark.parametrize("timestep", [3, torch.tensor(3), torch.tensor(3, dtype=torch.int32)], ids=repr)
@pytest.mark.parametrize("name", [EULER, HEUN])
def test_an_index_is_refused(name, timestep):
    x = torch.zeros(1, 3, 4, 4)
    for scheduler in pair(name):
        scheduler.set_timesteps(5)
        with pytest.raises(ValueError, match="timesteps"):
            scheduler.step(x, timestep, x)


@pytest.mark.parametrize("kind", ["plain", "dispatch mode", "subclass", "gradient", "other backend", "other sizes"])
def test_the_short_way_is_for_steps_that_nobody_watches(kind):
    ours, theirs = pair(EULER, {})
    generator = torch.Generator().manual_seed(0)
    x, m = torch.randn(2, 1, 3, 4, generator=generator)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(5)
        scheduler.step(m, scheduler.timesteps[0], x, return_dict=False)
    native.take_plain_steps()
    m = {
        "subclass": m.as_subclass(type("Own", (torch.Tensor,), {})),
        "gradient": m.clone().requires_grad_(),
        "other sizes": m[:, :1],
    }.get(kind, m)
    watching = {"dispatch mode": FlopCounterMode(display=False), "other backend": fastdiff.use_backend("reference")}
    with watching.get(kind, contextlib.nullcontext()):
        (made,) = ours.step(m, ours.timesteps[1], x, return_dict=False)
    assert native.take_plain_steps() == (kind == "plain")
    assert made.requires_grad == (kind == "gradient")
    (expected,) = theirs.step(m, theirs.timesteps[1], x, return_dict=False)
    assert relative(made.detach(), expected.detach()) <= 1e-5


@pytest.mark.parametrize("timestep", [3, torch.tensor(3), torch.tensor(3, dtype=torch.int32)], ids=repr)
def test_an_index_is_refused_in_the_middle_of_a_run(timestep):
    ours, _ = pair(EULER, {})
    ours.set_timesteps(4)
    x = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0))
    ours.step(x, ours.timesteps[0], x, return_dict=False)
    with pytest.raises(ValueError, match="timestep: expected one of the scheduler's timesteps"):
        ours.step(x, timestep, x, return_dict=False)
    assert ours.step_index == 1


def test_a_step_after_the_last_is_refused():
    x = torch.zeros(1, 3, 4, 4)
    for scheduler in pair(EULER):
        scheduler.set_timesteps(3)
        for t in scheduler.timesteps:
            scheduler.step(x, t, x)
        with pytest.raises(IndexError):
            scheduler.step(x, t, x)


@pytest.mark.parametrize("churn", [{}, {"s_churn": 5.0, "s_noise": 1.01}], ids=["plain", "churn"])
def test_public_state_of_heun_is_that_of_diffusers(churn):
    ours, theirs = pair(HEUN)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(4)
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for t in theirs.timesteps:
        for scheduler in (ours, theirs):
            scheduler.step(0.5 * x, t, x, generator=torch.Generator().manual_seed(1), **churn)
        for field in ("sample", "dt", "prev_derivative"):
            their, our = getattr(theirs, field), getattr(ours, field)
            assert (our is None) == (their is None), field
            assert their is None or relative(torch.as_tensor(our), torch.as_tensor(their)) < 1e-5, field


def test_heun_beyond_the_last_level():
    """Begun between two calls, diffusers divides by the last level, zero, in its last call."""
    results = []
    for scheduler in pair(HEUN):
        scheduler.set_timesteps(4)
        x = torch.full((1, 3, 4, 4), 0.5)
        for t in scheduler.timesteps[1:]:
            result = scheduler.step(0.3 * x, t, x).prev_sample
        results.append(result)
    assert torch.equal(*(result.isfinite() for result in results))
