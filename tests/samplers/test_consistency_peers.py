"""LCM, TCD and consistency sampling beside diffusers at every step."""

import diffusers
import pytest
from diffusers_peer import assert_parity, compare, differs, schedule_of, scheduler_for, table_for

from fastdiff import samplers, schedules


def build(method: str, steps: int | None, schedule, prediction: str, **options) -> samplers.StepTable:
    return samplers.build(method, schedule=schedule, steps=steps, prediction=prediction, **options)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("method", ["lcm", "tcd"])
def test_every_step_count_is_diffusers(method, prediction):
    for steps in range(1, 51):
        scheduler = scheduler_for(method, "scaled_linear", prediction)
        table = table_for(method, scheduler, prediction, steps)
        scheduler.set_timesteps(steps)
        assert table.timesteps.tolist() == scheduler.timesteps.tolist()
        if steps % 7 == 1:
            assert_parity(table, scheduler)


@pytest.mark.parametrize(
    ("method", "config", "options", "calls"),
    [
        ("lcm", {"clip_sample": True}, {"clip": 1.0}, {}),
        ("lcm", {"clip_sample": True, "clip_sample_range": 0.6}, {"clip": 0.6}, {}),
        ("lcm", {"set_alpha_to_one": False}, {}, {}),
        ("lcm", {"timestep_scaling": 0.05}, {"timestep_scaling": 0.05}, {}),
        ("lcm", {"original_inference_steps": 100}, {"original_steps": 100}, {}),
        ("lcm", {}, {"original_steps": 37}, {"original_inference_steps": 37}),
        ("lcm", {}, {"strength": 0.55}, {"strength": 0.55}),
        ("tcd", {"set_alpha_to_one": False}, {}, {}),
        ("tcd", {"original_inference_steps": 20}, {"original_steps": 20}, {}),
        ("tcd", {}, {"original_steps": 1000}, {"original_inference_steps": 500}),
        ("tcd", {}, {"strength": 0.8}, {"strength": 0.8}),
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 6, 20])
def test_configuration(method, config, options, calls, steps):
    scheduler = scheduler_for(method, "scaled_linear", "v", **config)
    compare_custom(scheduler, table_for(method, scheduler, "v", steps, **options), steps, **calls)


@pytest.mark.parametrize("eta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_tcd_eta(eta):
    scheduler = scheduler_for("tcd", "linear", "epsilon")
    for steps in (1, 8, 50):
        assert_parity(table_for("tcd", scheduler, "epsilon", steps, eta=eta), scheduler, eta=eta)


@pytest.mark.parametrize("eta", [0.1, 0.3, 0.7, 0.9])
def test_tcd_rounds_whole_products_to_themselves(eta):
    """(1 - 0.9) * 10 is 1, though not in floating point."""
    times = list(range(990, 0, -10))
    scheduler = scheduler_for("tcd", "linear", "v")
    table = table_for("tcd", scheduler, "v", None, spacing=None, timesteps=times, eta=eta)
    scheduler.set_timesteps(timesteps=times)
    assert differs(table, scheduler, eta=eta) == []


@pytest.mark.parametrize("method", ["lcm", "tcd"])
@pytest.mark.parametrize("strength", [None, 0.5])
def test_custom_timesteps(method, strength):
    times = [999, 759, 500, 259, 19]
    scheduler = scheduler_for(method, "scaled_linear", "epsilon")
    options = {"spacing": None, "timesteps": times, "strength": strength}
    table = table_for(method, scheduler, "epsilon", None, **options)
    scheduler.set_timesteps(timesteps=times, strength=strength or 1.0)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    steps = list(compare(table, scheduler))
    wrong = [i for i, step in enumerate(steps) if step.error > step.bound]
    if strength is None:
        assert wrong == []
    else:
        # Theirs counts the dropped steps too and adds noise to its result, as the docstring says.
        assert wrong == ([1] if method == "lcm" else [])
        assert method == "tcd" or float((steps[-1].theirs - steps[-1].ours).std()) > 0.03


def compare_custom(scheduler, table, steps: int, **calls) -> None:
    """`assert_parity` where set_timesteps takes more than the number of steps."""
    scheduler.set_timesteps(steps, **calls)
    assert table.timesteps.tolist() == scheduler.timesteps.tolist()
    for index, step in enumerate(compare(table, scheduler)):
        assert step.error < step.bound, f"row {index}: relative error {step.error:.1e}, bound {step.bound:.1e}"


def karras_levels(scheduler) -> list[float]:
    """Their levels: every T // steps of the training ramp, which need not reach sigma_min."""
    return scheduler.sigmas[:-1].double().tolist()


@pytest.mark.parametrize("clip", [True, False])
def test_consistency_is_diffusers(clip):
    for steps in (1, 2, 3, 18, 40):
        scheduler = diffusers.CMStochasticIterativeScheduler(clip_denoised=clip)
        scheduler.set_timesteps(steps)
        options = {"clip": 1.0 if clip else None, "sigmas": karras_levels(scheduler)}
        assert_parity(build("consistency", None, schedule_of(scheduler), "edm", **options), scheduler)


def test_consistency_custom_timesteps_and_noise():
    scheduler = diffusers.CMStochasticIterativeScheduler(s_noise=1.1, sigma_max=60.0, sigma_min=0.01, sigma_data=0.7)
    scheduler.set_timesteps(timesteps=[22, 11, 0])
    options = {"clip": 1.0, "s_noise": 1.1, "sigmas": karras_levels(scheduler)}
    table = build("consistency", None, schedule_of(scheduler), "edm", **options)
    assert differs(table, scheduler) == []
    scheduler.set_timesteps(timesteps=[22, 11, 0])
    other = build("consistency", None, schedules.edm(40, timestep_scale=1000.0), "edm", **options)
    assert differs(other, scheduler) == [0, 1, 2]


@pytest.mark.parametrize("steps", [1, 2, 9])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_lcm_on_a_flow_schedule_is_diffusers(steps, shift):
    """FlowMatchLCMScheduler, from their own levels: their last is shifted twice."""
    scheduler = diffusers.FlowMatchLCMScheduler(1000, shift=shift)
    scheduler.set_timesteps(steps)
    options = {"timestep_scaling": None, "sigmas": scheduler.sigmas[:-1].double().tolist()}
    assert_parity(build("lcm", None, schedule_of(scheduler), "flow", **options), scheduler)
