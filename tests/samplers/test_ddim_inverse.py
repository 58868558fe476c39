"""DDIM inversion: from an image to its noise and back, against the exact flow and diffusers."""

import numpy as np
import pytest
import torch
from diffusers_peer import SHAPE, relative, schedule_of, scheduler_for, table_for
from interpret import solve, trajectory
from mixture import Mixture

from fastdiff import ops, samplers, schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import KNOWN

VP, FLOW, VE = (
    schedules.linear(1000),
    schedules.flow(1000, shift=2.0),
    schedules.ve(1000, sigma_min=0.02, sigma_max=50.0),
)
MIXTURE, QUANTILES = Mixture(), np.linspace(0.02, 0.98, 25)
CASES = {"vp": (VP, "v"), "vp-epsilon": (VP, "epsilon"), "flow": (FLOW, "flow"), "ve": (VE, "epsilon")}


@pytest.mark.parametrize("told", ["start", "end"])
@pytest.mark.parametrize("case", CASES)
def test_against_a_loop(case, told):
    """Song et al. 2021, equation 13 read upwards: x'/alpha' = x/alpha + (sigma'/alpha' - sigma/alpha) epsilon."""
    schedule, prediction = CASES[case]
    table = samplers.build("ddim_inverse", schedule=schedule, steps=8, prediction=prediction, told=told)
    grid, network = table.grid, MIXTURE.denoiser(schedule, prediction)
    assert table.inverse
    assert table.init_level == (1.0, 0.0)
    assert (np.diff(grid.noise_ratios) > 0).all()
    x = np.linspace(-2.0, 2.0, 9)
    for i, found in enumerate(trajectory(network, table, x)):
        (a, s), (a1, s1) = (grid.alphas[i], grid.sigmas[i]), (grid.alphas[i + 1], grid.sigmas[i + 1])
        t = grid.timesteps[i + 1] if told == "end" else grid.timesteps[i]
        assert table.timesteps[i] == t
        m = network(x, t)
        e = {"epsilon": m, "v": a * m + s * x, "flow": x + a * m}[prediction]
        e = e / (a + s) if prediction == "flow" else e / (a * a + s * s) if prediction == "v" else e
        x = a1 * (x - s * e) / a + s1 * e
        np.testing.assert_allclose(found, x, rtol=1e-9, atol=1e-9)
    assert tuple(table.rows[-1, KNOWN]) == (grid.alphas[-1], grid.sigmas[-1])


def distance(schedule, prediction, steps, told):
    """Of the noise that the quantiles of the lowest level are carried to from the exact quantiles there."""
    ends = {"sigma_min": 0.05, "sigma_max": 0.95 if schedule.kind == "flow" else 20.0}
    options = {"spacing": "karras", "final_sigma": "schedule", **ends}
    table = samplers.build("ddim_inverse", schedule=schedule, steps=steps, prediction=prediction, told=told, **options)
    grid = table.grid
    start = MIXTURE.quantile(QUANTILES, grid.alphas[0], grid.sigmas[0])
    end = solve(MIXTURE.denoiser(schedule, prediction), table, start)
    return np.sqrt(np.mean((end - MIXTURE.quantile(QUANTILES, grid.alphas[-1], grid.sigmas[-1])) ** 2))


@pytest.mark.parametrize("told", ["start", "end"])
@pytest.mark.parametrize("case", CASES)
def test_order_of_convergence(case, told):
    errors = [distance(*CASES[case], steps, told) for steps in (160, 320, 640)]
    slopes = np.log2(np.divide(errors[:-1], errors[1:]))
    assert slopes[-1] == pytest.approx(1.0, abs=0.06), f"slopes {slopes}, errors {errors}"
    assert samplers.methods()["ddim_inverse"].order == 1


def round_trip(steps, **options):
    common = {"schedule": VP, "steps": steps, "prediction": "v", "spacing": "karras", "sigma_max": 20.0}
    up = samplers.build("ddim_inverse", **common, **options)
    down = samplers.build("ddim", **common)
    images = MIXTURE.sample(np.random.default_rng(0), 400)
    network = MIXTURE.denoiser(VP, "v")
    noise = solve(network, up, images)
    return np.sqrt(np.mean((solve(network, down, noise) - images) ** 2))


@pytest.mark.parametrize("told", ["start", "end"])
def test_round_trip(told):
    """The image comes back, the better the more steps there are: by half with twice as many."""
    errors = [round_trip(steps, told=told) for steps in (100, 200, 400)]
    assert errors[-1] < 0.02
    assert np.log2(errors[1] / errors[2]) == pytest.approx(1.0, abs=0.2)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        ({"clip_sample": False}, {"clip": None}),
        ({"timestep_spacing": "trailing"}, {"spacing": "trailing"}),
        ({"clip_sample_range": 0.7}, {"clip": 0.7}),
        ({"steps_offset": 1}, {"steps_offset": 1}),
        ({"set_alpha_to_one": False}, {"endpoint": True, "final_sigma": "schedule"}),
    ],
    ids=str,
)
def test_diffusers(config, options, schedule, prediction):
    for steps in (2, 7, 50):
        scheduler = scheduler_for("ddim_inverse", schedule, prediction, **config)
        scheduler.set_timesteps(steps)
        table = table_for("ddim_inverse", scheduler, prediction, steps, **options)
        assert table.timesteps.tolist() == scheduler.timesteps.tolist()
        x = 0.5 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
        for index, t in enumerate(scheduler.timesteps):
            m = torch.sin(3.0 * x + 0.01 * float(t))
            theirs = scheduler.step(m, t, x).prev_sample
            ours = ops.sampler_step(x, m, table.tensor(), index).x
            alpha = float(schedule_of(scheduler).alphas[int(table.timesteps[max(index - 1, 0)])])
            # Where alpha is small the data prediction is a difference of large numbers.
            assert relative(ours, theirs) < 1e-5 + 1e-7 / alpha
            x = theirs


def test_clipped_epsilon_leads_to_the_clipped_data():
    table = samplers.build("ddim_inverse", schedule=VP, steps=4, prediction="v", clip=0.5)
    x, v = np.array([1.4]), np.array([-0.3])
    first, second, *_ = trajectory(lambda *_: v, table, x)
    (a1, s1), (a2, s2) = zip(table.grid.alphas[1:3], table.grid.sigmas[1:3], strict=True)
    np.testing.assert_allclose(first, a1 * 0.5 + s1 * v, rtol=1e-12)
    data = np.clip(a1 * first - s1 * v, -0.5, 0.5)
    np.testing.assert_allclose(second, a2 * data + s2 * (first - a1 * data) / s1, rtol=1e-12)


def test_a_sample_prediction_cannot_start_at_the_data():
    """At sigma = 0 it says nothing about the noise; from the schedule's first level it does."""
    options = {"schedule": VP, "steps": 5, "prediction": "sample"}
    with pytest.raises(InputError, match="'sample' at alpha=1, sigma=0 does not determine the data"):
        samplers.build("ddim_inverse", **options)
    table = samplers.build("ddim_inverse", final_sigma="schedule", **options)
    assert table.init_level == pytest.approx((VP.alphas[0], VP.sigmas[0]), rel=1e-12)


def test_bad_options_are_refused():
    with pytest.raises(InputError, match="ddim_inverse: told: expected one of start, end"):
        samplers.build("ddim_inverse", schedule=VP, steps=5, prediction="v", told="middle")
    with pytest.raises(InputError, match="ddim_inverse: no option 'eta'"):
        samplers.build("ddim_inverse", schedule=VP, steps=5, prediction="v", eta=1.0)
