"""Where fastdiff differs from diffusers on purpose: each test shows both sides, and that ours is the right one."""

import diffusers
import numpy as np
import pytest
from diffusers_peer import compare, differs, scheduler_for, table_for
from interpret import solve
from mixture import Mixture

from fastdiff import samplers, schedules
from fastdiff.samplers import grid

QUANTILES = np.linspace(0.02, 0.98, 25)


def distance_from_the_data(method: str, steps: int, **options) -> float:
    """Of the quantiles that a deterministic method carries from the noise to the data; DDIM's own error included."""
    mixture, schedule = Mixture(), schedules.linear(1000)
    table = samplers.build(method, schedule=schedule, steps=steps, prediction="v", **options)
    start = mixture.quantile(QUANTILES, table.grid.alphas[0], table.grid.sigmas[0])
    end = solve(mixture.denoiser(schedule, "v"), table, start)
    return float(np.sqrt(np.mean((end - mixture.quantile(QUANTILES, 1.0, 0.0)) ** 2)))


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("steps", [7, 30, 600])
def test_ddim_ends_each_step_where_the_next_begins(spacing, steps):
    """Theirs goes to t - T // steps, which is another point than the next one unless the spacing is leading."""
    scheduler = scheduler_for("ddim", "linear", "v", timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    elsewhere = np.flatnonzero(-np.diff(scheduler.timesteps.numpy()) != 1000 // steps)
    assert len(elsewhere) > 0
    corrected = table_for("ddim", scheduler, "v", steps, spacing=spacing, clip=None, previous_timestep="grid")
    assert set(elsewhere) <= set(differs(corrected, scheduler))


def test_ddim_stride_at_600_steps_loses_the_signal():
    """1000 // 600 is 1: theirs takes 600 steps of 1 where the points are 1.67 apart, and noise is left over."""
    assert distance_from_the_data("ddim", 600, spacing="trailing", previous_timestep="stride") > 0.05
    assert distance_from_the_data("ddim", 600, spacing="trailing") < 0.01


def test_ddpm_with_large_variance_adds_no_noise_to_the_result():
    """Theirs adds noise in the step that ends at the data, unless it starts at timestep 0."""
    scheduler = scheduler_for("ddpm", "linear", "v", variance_type="fixed_large", timestep_spacing="trailing")
    table = table_for("ddpm", scheduler, "v", 20, spacing="trailing", variance="fixed_large")
    scheduler.set_timesteps(20)
    assert differs(table, scheduler) == [19]
    scheduler.set_timesteps(20)
    *_, last = compare(table, scheduler)
    sigma = schedules.linear(1000).at(float(scheduler.timesteps[-1]))[1]
    assert float((last.theirs - last.ours).std()) == pytest.approx(float(sigma), rel=0.15)
    assert sigma > 0.07


def test_one_linspace_step_starts_at_the_noise():
    """Theirs is at timestep 0, where the network is asked for the noise in a clean image."""
    scheduler = scheduler_for("ddim", "linear", "v", timestep_spacing="linspace")
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [0]
    table = samplers.build("ddim", schedule=schedules.linear(1000), steps=1, prediction="v", spacing="linspace")
    assert table.timesteps.tolist() == [999]


def test_trailing_takes_the_steps_asked_for():
    """Theirs counts in floating-point strides, and for some step counts adds a timestep of -1."""
    wrong, schedule = [], schedules.linear(1000)
    for steps in range(1, 1001):
        theirs = np.round(np.arange(1000, 0, -1000 / steps)) - 1
        ours = grid.build(schedule, steps, grid.GridOptions(spacing="trailing")).timesteps[:-1]
        assert len(ours) == steps
        if len(theirs) != steps:
            wrong.append(steps)
        else:
            # Apart from that they differ by one at exact halves, which their strides round either way.
            halves = (2000 * np.arange(steps, 0, -1)) % (2 * steps) == steps
            assert np.array_equal(ours[~halves], theirs[~halves])
            assert np.abs(ours - theirs).max() <= 1
    scheduler = scheduler_for("ddim", "linear", "v", timestep_spacing="trailing")
    scheduler.set_timesteps(wrong[0])
    assert len(scheduler.timesteps) == wrong[0] + 1
    assert scheduler.timesteps[-1] == -1


@pytest.mark.parametrize("method", ["euler", "dpmpp_2m"])
def test_karras_to_the_schedules_own_end_wastes_no_step(method):
    """Theirs reaches sigma_min one step early and repeats it: the last step changes nothing."""
    config = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"}
    scheduler = scheduler_for(method, "scaled_linear", "v", **config)
    scheduler.set_timesteps(8)
    assert float(scheduler.sigmas[-1]) == pytest.approx(float(scheduler.sigmas[-2]), rel=1e-6)
    ours = samplers.build(
        method,
        schedule=schedules.scaled_linear(1000),
        steps=8,
        prediction="v",
        spacing="karras",
        final_sigma="schedule",
    )
    ratios = ours.grid.noise_ratios
    assert ratios[-1] == pytest.approx(float(scheduler.sigmas[-1]), rel=1e-3)
    assert ratios[-1] < 0.6 * ratios[-2]


def test_flow_shift_is_applied_once():
    """Theirs shifts the end of its range before it shifts the grid: with shift 3 the last sigma is shifted twice."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    scheduler.set_timesteps(10)
    once = 3 * 0.001 / (1 + 2 * 0.001)
    twice = 3 * once / (1 + 2 * once)
    assert float(scheduler.sigmas[-2]) == pytest.approx(twice, rel=1e-6)
    options = {"schedule": schedules.flow(1000, shift=3.0), "steps": 10, "prediction": "flow", "spacing": "linspace"}
    assert samplers.build("flow_euler", **options).grid.sigmas[-2] == pytest.approx(once, rel=1e-12)
    # Their numbers, where they are wanted:
    same = samplers.build("flow_euler", **options, sigma_min=once)
    np.testing.assert_allclose(same.grid.sigmas, scheduler.sigmas, rtol=1e-6)


@pytest.mark.parametrize(("schedule", "build"), [("linear", schedules.linear), ("cosine", schedules.cosine)])
def test_noise_of_the_first_timestep_keeps_its_digits(schedule, build):
    """Theirs takes 1 - alphas_cumprod in float32 and loses three digits of the smallest sigma."""
    theirs = 1.0 - float(scheduler_for("ddpm", schedule, "v").alphas_cumprod[0])
    exact = (
        1e-4
        if schedule == "linear"
        else 1.0 - (np.cos(0.009 / 1.008 * np.pi / 2) / np.cos(0.008 / 1.008 * np.pi / 2)) ** 2
    )
    ours = float(build(1000).sigmas[0] ** 2)
    assert ours == pytest.approx(exact, rel=1e-10)
    assert abs(theirs / exact - 1.0) > 1e-4
