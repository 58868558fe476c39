"""Flow Euler and Heun: closed forms, order, and diffusers at every step, with every way it places its levels."""

import diffusers
import numpy as np
import pytest
from convergence import assert_order
from diffusers_peer import assert_parity, network, relative, schedule_of
from interpret import trajectory
from torch import Generator, randn

from fastdiff import ops, samplers, schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import INPUTS, NEW_ANCHOR, NEW_X

FLOW = schedules.flow(1000)
PREDICTIONS = ["flow", "sample"]


def build(method: str, steps: int | None, schedule=FLOW, prediction: str = "flow", **options) -> samplers.StepTable:
    return samplers.build(method, schedule=schedule, steps=steps, prediction=prediction, **options)


def velocity(x: np.ndarray, t: float) -> np.ndarray:
    return np.sin(2.0 * x) + t * x


def model(prediction: str):
    """The network of that velocity: x_0 = x - t u."""
    return lambda x, t: velocity(x, t / 1000) if prediction == "flow" else x - t / 1000 * velocity(x, t / 1000)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_heun_is_the_textbooks_loop(steps, prediction):
    table = build("flow_heun", steps, prediction=prediction)
    x = np.linspace(-2.0, 2.0, 9)
    states = list(trajectory(model(prediction), table, x))
    assert len(states) == 2 * steps - 1
    for i in range(steps):
        t, t1 = 1 - i / steps, 1 - (i + 1) / steps
        u = velocity(x, t)
        euler = x + (t1 - t) * u
        np.testing.assert_allclose(states[2 * i], euler, rtol=1e-9, atol=1e-12)
        if i + 1 < steps:
            x = x + (t1 - t) * (u + velocity(euler, t1)) / 2
            np.testing.assert_allclose(states[2 * i + 1], x, rtol=1e-9, atol=1e-12)


def test_heun_keeps_its_anchor():
    table = build("flow_heun", 4)
    anchor, second = (dict(zip(INPUTS, table.rows[i, b], strict=True)) for i, b in ((0, NEW_ANCHOR), (1, NEW_X)))
    assert (anchor["x"], anchor["m"]) == (1.0, -0.125)
    assert (second["anchor"], second["m"], second["x"]) == (1.0, -0.125, 0.0)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_order_of_heun(spacing, prediction):
    assert_order(2, "flow_heun", schedules.flow(1000, shift=2.0), prediction, spacing)
    assert samplers.methods()["flow_heun"].order == 2


def test_heun_with_a_clip_is_heun_from_the_clipped_data():
    table = build("flow_heun", 3, clip=0.5)
    x = np.linspace(-2.0, 2.0, 9)
    *_, ours = trajectory(model("flow"), table, x)

    def bounded(x, t):
        return (x - np.clip(x - t * velocity(x, t), -0.5, 0.5)) / t

    for i in range(3):
        t, t1 = 1 - i / 3, 1 - (i + 1) / 3
        u = bounded(x, t)
        end = x + (t1 - t) * u
        x = x + (t1 - t) * (u + bounded(end, t1)) / 2 if i < 2 else end
    np.testing.assert_allclose(ours, x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_stochastic_euler(prediction):
    """x' = (1 - t') D + t' z, nothing of x but through D."""
    table = build("flow_euler", 4, prediction=prediction, stochastic=True)
    for i, row in enumerate(table.rows):
        t1 = 0.75 - i / 4
        found = {name: c for name, c in zip(INPUTS, row[NEW_X].tolist(), strict=True) if c}
        expected = {"D": 1 - t1, "noise": t1} if t1 else {"D": 1.0}
        assert found == pytest.approx(expected, rel=1e-12)
    assert [use.noise for use in table.uses] == [True, True, True, False]


def test_inverted_euler_is_euler_with_the_other_clock():
    plain, other = build("flow_euler", 5), build("flow_euler", 5, inverted=True)
    x = np.linspace(-2.0, 2.0, 9)
    expected = list(trajectory(model("flow"), plain, x))
    found = list(trajectory(lambda y, t: -velocity(y, 1 - t / 1000), other, x))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    clipped = build("flow_euler", 5, clip=0.5, inverted=True)
    expected = list(trajectory(model("flow"), build("flow_euler", 5, clip=0.5), x))
    found = list(trajectory(lambda y, t: -velocity(y, 1 - t / 1000), clipped, x))
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    with pytest.raises(InputError, match="inverted: needs the prediction 'flow'"):
        build("flow_euler", 5, prediction="sample", inverted=True)


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_is_diffusers(steps, shift):
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(1000, shift=shift)
    scheduler.set_timesteps(steps)
    # Their last level is shifted twice.
    levels = [*scheduler.sigmas[0:1].tolist(), *scheduler.sigmas[1:-1:2].tolist()]
    table = build("flow_heun", None, schedule_of(scheduler), sigmas=levels)
    assert_parity(table, scheduler, steps=steps)
    if shift == 1.0:
        assert_parity(build("flow_heun", steps, schedule_of(scheduler), spacing="linspace"), scheduler)


@pytest.mark.parametrize("churn", [{"s_churn": 4.0}, {"s_churn": 90.0, "s_tmin": 0.2, "s_tmax": 0.8, "s_noise": 0.9}])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_churn_of_heun(prediction, churn):
    """The formula of the docstring in a loop of its own."""
    steps, generator = 6, np.random.default_rng(0)
    table = build("flow_heun", steps, prediction=prediction, **churn)
    x, z = np.linspace(-2.0, 2.0, 9), generator.standard_normal((2 * steps - 1, 9))
    states = list(trajectory(model(prediction), table, x, lambda row: z[row]))
    for i in range(steps):
        t, t1 = 1 - i / steps, 1 - (i + 1) / steps
        inside = churn.get("s_tmin", 0.0) <= t <= churn.get("s_tmax", 2.0)
        s = t * (1.0 + (min(churn["s_churn"] / (2 * steps - 1), np.sqrt(2) - 1) if inside else 0.0))
        u, h = velocity(x, t) * t / s, t1 - s
        x = x + churn.get("s_noise", 1.0) * np.sqrt(s * s - t * t) * z[2 * i]
        np.testing.assert_allclose(states[2 * i], x + h * u, rtol=1e-9, atol=1e-12)
        if i + 1 < steps:
            x = x + h / 2 * (u + velocity(x + h * u, t1))
            np.testing.assert_allclose(states[2 * i + 1], x, rtol=1e-9, atol=1e-12)


DYNAMIC = {"use_dynamic_shifting": True}
CONFIGURATIONS = {
    "stochastic": ({"stochastic_sampling": True}, {}, {"stochastic": True}),
    "stochastic-shift": ({"stochastic_sampling": True, **DYNAMIC}, {"mu": 0.8}, {"stochastic": True, "shift": 0.8}),
    "dynamic": (DYNAMIC, {"mu": 0.9}, {"shift": 0.9}),
    "dynamic-linear": ({**DYNAMIC, "time_shift_type": "linear"}, {"mu": 1.9}, {"shift": np.log(1.9)}),
    "terminal": ({"shift_terminal": 0.1, **DYNAMIC}, {"mu": 1.2}, {"shift": 1.2, "shift_terminal": 0.1}),
    "karras": ({"use_karras_sigmas": True}, {}, {"spacing": "karras"}),
    "exponential": ({"use_exponential_sigmas": True}, {}, {"spacing": "exponential"}),
    "beta": ({"use_beta_sigmas": True}, {}, {"spacing": "beta"}),
}


@pytest.mark.parametrize("case", CONFIGURATIONS)
@pytest.mark.parametrize("steps", [2, 7, 20])
def test_euler_is_diffusers(case, steps):
    config, calls, options = CONFIGURATIONS[case]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000, **config)
    options = {"spacing": "linspace", **options}
    if "shift" in options:
        options["shift"] = float(np.exp(options["shift"]))
    table = build("flow_euler", steps, schedule_of(scheduler), **options)
    scheduler.set_timesteps(steps, **calls)
    np.testing.assert_allclose(table.grid.sigmas, scheduler.sigmas.double(), rtol=2e-6)
    assert_euler(table, scheduler)


@pytest.mark.parametrize("steps", [1, 2, 9])
def test_inverted_euler_is_diffusers(steps):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000, invert_sigmas=True)
    scheduler.set_timesteps(steps)
    table = build("flow_euler", steps, schedule_of(scheduler), spacing="linspace", inverted=True)
    assert_euler(table, scheduler)


@pytest.mark.parametrize("shift", [None, 2.0])
def test_euler_from_given_sigmas_is_diffusers(shift):
    """diffusers shifts what it is given; ours only where it is told to."""
    given = [1.0, 0.7, 0.31, 0.05]
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=shift or 1.0)
    scheduler.set_timesteps(sigmas=given)
    assert_euler(build("flow_euler", None, sigmas=given, shift=shift), scheduler)


def assert_euler(table: samplers.StepTable, scheduler) -> None:
    """Each step from their state, network output and noise."""
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps.numpy(), rtol=2e-6, atol=1e-4)
    generator, twin = (Generator().manual_seed(7) for _ in range(2))
    x = randn(2, 3, 8, 8, generator=Generator().manual_seed(3))
    stochastic = scheduler.config.stochastic_sampling
    for index, t in enumerate(scheduler.timesteps):
        m = network(FLOW, "flow", x, max(float(t), 1.0))
        theirs = scheduler.step(m, t, x, generator=generator).prev_sample
        noise = randn(x.shape, generator=twin) if stochastic else None
        ours = ops.sampler_step(x, m, table.tensor(), index, noise=noise if table.uses[index].noise else None)
        assert relative(ours.x, theirs) < 1e-5, index
        x = theirs
