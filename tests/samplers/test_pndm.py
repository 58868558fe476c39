"""PNDM and PLMS against loops written from the paper, their order, and diffusers."""

from itertools import pairwise

import numpy as np
import pytest
from convergence import assert_order
from diffusers_peer import assert_parity, differs, scheduler_for, table_for
from interpret import trajectory
from mixture import Mixture

from fastdiff import samplers, schedules
from fastdiff.errors import InputError

VP, FLOW, MIXTURE = schedules.linear(1000), schedules.flow(1000, shift=2.0), Mixture()
WEIGHTS = {1: [1.0], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


def transfer(x, e, start, end):
    """Equation 9 in alpha and sigma."""
    (alpha, sigma), (alpha1, sigma1) = start, end
    return alpha1 * (x - sigma * e) / alpha + sigma1 * e


def loop(grid, schedule, x, *, runge_kutta):
    """The states before each network call but the first, and the result."""
    states, history = [], []

    def noise(x, level):
        states.append(x)
        alpha, sigma = level
        return (x - alpha * MIXTURE.denoise(x, alpha, sigma)) / sigma

    levels = list(zip(grid.alphas, grid.sigmas, strict=True))
    for i, (start, end) in enumerate(pairwise(levels)):
        k1 = noise(x, start)
        signal = start[0] > 0 and end[1] > 0
        if runge_kutta and i < 3 and signal:
            middle = tuple(map(float, schedule.at(0.5 * (grid.timesteps[i] + grid.timesteps[i + 1]))))
            k2 = noise(transfer(x, k1, start, middle), middle)
            k3 = noise(transfer(x, k2, start, middle), middle)
            k4 = noise(transfer(x, k3, start, end), end)
            e = (k1 + 2 * k2 + 2 * k3 + k4) / 6
        elif not runge_kutta and i == 0 and signal and len(levels) > 2:
            e = (k1 + noise(transfer(x, k1, start, end), end)) / 2
        else:
            used = [k1, *history[:3]]
            e = sum(w * k for w, k in zip(WEIGHTS[len(used)], used, strict=True))
        history.insert(0, k1)
        if start[0] == 0.0:
            x = end[0] * MIXTURE.denoise(x, *start) + end[1] * k1
        else:
            x = transfer(x, e, start, end)
        states.append(x)
    # A step's result is the next one's first state.
    merged = [states[0]]
    for state in states[1:]:
        if state is not merged[-1]:
            merged.append(state)
    return merged[1:]


@pytest.mark.parametrize("method", ["pndm", "plms"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("final", ["zero", "schedule"])
@pytest.mark.parametrize("prediction", ["v", "epsilon"])
def test_against_a_loop(method, steps, final, prediction):
    options = {"spacing": "leading", "endpoint": False, "final_sigma": final}
    table = samplers.build(method, schedule=VP, steps=steps, prediction=prediction, **options)
    x = np.random.default_rng(0).standard_normal(30)
    expected = loop(table.grid, VP, x, runge_kutta=method == "pndm")
    found = trajectory(MIXTURE.denoiser(VP, prediction), table, x)
    for ours, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["pndm", "plms"])
def test_a_start_without_signal(method):
    """The step from the flow schedule's t = 1 is DDIM's, and the weights rise from the second step on."""
    table = samplers.build(method, schedule=FLOW, steps=8, prediction="flow")
    assert table.grid.alphas[0] == 0.0
    x = np.random.default_rng(0).standard_normal(30)
    expected = loop(table.grid, FLOW, x, runge_kutta=method == "pndm")
    found = trajectory(MIXTURE.denoiser(FLOW, "flow"), table, x)
    for ours, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("method", ["pndm", "plms"])
@pytest.mark.parametrize(("schedule", "prediction"), [(VP, "v"), (FLOW, "flow")], ids=["vp", "flow"])
def test_order_of_convergence(method, schedule, prediction, spacing):
    assert_order(2, method, schedule, prediction, spacing)
    assert samplers.methods()[method].order == 2


def test_combined_outputs_are_the_same_for_epsilon_and_for_v_another_sum():
    options = {"schedule": VP, "steps": 6, "spacing": "linspace"}
    x = np.random.default_rng(0).standard_normal(30)
    for prediction, same in (("epsilon", True), ("v", False)):
        ends = []
        for combined in ("noise", "output"):
            table = samplers.build("plms", prediction=prediction, combined=combined, **options)
            *_, end = trajectory(MIXTURE.denoiser(VP, prediction), table, x)
            ends.append(end)
        assert np.allclose(*ends, rtol=1e-9, atol=1e-9) == same


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize(("method", "counts"), [("pndm", (4, 7, 40, 50)), ("plms", (1, 2, 3, 7, 40, 50))])
def test_diffusers(method, counts, schedule, prediction):
    """40 steps are 25 timesteps each, whose middle is none; they have no sample prediction, nor PNDM below 4 steps."""
    for steps in counts:
        scheduler = scheduler_for(method, schedule, prediction)
        assert_parity(table_for(method, scheduler, prediction, steps), scheduler)


@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({"set_alpha_to_one": True}, {"final_sigma": "zero"}),
        ({"steps_offset": 1}, {"steps_offset": 1}),
        ({"steps_offset": 1, "set_alpha_to_one": True}, {"steps_offset": 1, "final_sigma": "zero"}),
        ({"timestep_spacing": "linspace"}, {"spacing": "linspace"}),
        ({"timestep_spacing": "trailing"}, {"spacing": "trailing", "endpoint": None}),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["pndm", "plms"])
def test_diffusers_configuration(method, config, options):
    for steps in (7, 20):
        scheduler = scheduler_for(method, "scaled_linear", "epsilon", **config)
        assert_parity(table_for(method, scheduler, "epsilon", steps, **options), scheduler)


def test_diffusers_sums_outputs_of_different_points():
    """A v is that of its own state; theirs takes the noise prediction of a sum of v's at the newest state."""
    scheduler = scheduler_for("plms", "scaled_linear", "v")
    table = table_for("plms", scheduler, "v", 10, combined="noise")
    scheduler.set_timesteps(10)
    assert differs(table, scheduler) == list(range(1, 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combined": "data"}, "plms: combined: expected one of noise, output"),
        ({"combined": "output", "clip": 1.0}, "'output' makes no data prediction that could be clipped"),
        ({"previous_timestep": "next"}, "plms: previous_timestep: expected one of grid, stride"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        samplers.build("plms", schedule=VP, steps=5, prediction="v", **options)
