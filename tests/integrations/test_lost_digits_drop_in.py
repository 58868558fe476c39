"""Schedules on which a step of diffusers is what its rounding leaves, or has no level to go from or to."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from drop_in import SHAPE, assert_parity, network, pair, relative, start
from torch import Tensor

COSINE = {"beta_schedule": "squaredcos_cap_v2"}
SHORT = {"trained_betas": np.linspace(1e-3, 0.02, 200).tolist()}
"""Fewer betas than timesteps: the first levels of a run are equal."""
ONE_CALL = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler")
TWO_CALLS = (
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSDEScheduler",
)


def normal_network(x: Tensor, t: object) -> Tensor:
    """An output of standard deviation 1, as of networks whose input is not scaled."""
    m = network(x, t).float()
    return (m / m.std().clamp(min=1e-6)).to(x.dtype)


def bounded_network(x: Tensor, t: object) -> Tensor:
    """An output like the state, of a standard deviation of at most 1."""
    m = network(x, t)
    return m / m.std().clamp(min=1e-6) * x.std().clamp(max=1.0)


def scaled_network(x: Tensor, t: Tensor) -> Tensor:
    return x * t / (t + 1)


@pytest.mark.parametrize("steps", [1, 2, 3, 7])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", ONE_CALL + TWO_CALLS)
def test_cosine_schedule(name: str, kind: str, steps: int) -> None:
    assert_parity(name, {**COSINE, "prediction_type": kind}, steps=steps, model=normal_network)


@pytest.mark.parametrize(
    ("name", "steps"), list(product(("HeunDiscreteScheduler", "EulerDiscreteScheduler"), (1, 2, 10)))
)
def test_data_prediction_on_the_cosine_schedule(name: str, steps: int) -> None:
    config = {**COSINE, "prediction_type": "sample", "timestep_spacing": "trailing"}
    assert_parity(name, config, steps=steps, model=normal_network)


@pytest.mark.parametrize("sigmas", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler"])
def test_spacings_of_the_cosine_schedule(name: str, sigmas: str) -> None:
    assert_parity(name, {**COSINE, sigmas: True}, steps=5, model=normal_network)


def test_churn_on_the_cosine_schedule() -> None:
    config = {**COSINE, "prediction_type": "v_prediction"}
    assert_parity("EulerDiscreteScheduler", config, steps=3, step_options={"s_churn": 5.0}, model=normal_network)


def test_two_steps_of_edm() -> None:
    assert_parity(
        "EDMEulerScheduler", {"sigma_min": 0.02}, steps=2, step_options={"s_churn": 5.0}, model=normal_network
    )


@pytest.mark.parametrize("name", [*ONE_CALL, *TWO_CALLS, "DEISMultistepScheduler", "UniPCMultistepScheduler"])
def test_equal_levels(name: str) -> None:
    config = {**SHORT, "timestep_spacing": "leading"}
    assert_parity(name, config, steps=10, model=normal_network)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_slopes_in_half_precision_of_both(dtype: torch.dtype) -> None:
    """Each of them is kept by whoever took the step."""
    ours, theirs = pair("LMSDiscreteScheduler", {**COSINE, "use_karras_sigmas": True})
    x = torch.ones(SHAPE, dtype=dtype)
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(5)
    for t in theirs.timesteps:
        assert [s.step(network(x, t), t, x).prev_sample.dtype for s in (ours, theirs)] == [dtype, dtype]


def test_two_call_run_from_the_second_of_equal_timesteps() -> None:
    """It ends after the last timestep, at a level that no row starts from."""
    config = {**COSINE, "use_karras_sigmas": True}
    assert_parity("KDPM2AncestralDiscreteScheduler", config, steps=7, model=normal_network)


@pytest.mark.parametrize("lowers", [True, False])
@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverSinglestepScheduler", "SASolverScheduler"])
def test_multistep_run_from_the_second_of_equal_timesteps(name: str, lowers: bool) -> None:
    """As many steps as diffusers can take, and then the error that it raises."""
    config = {**COSINE, "use_beta_sigmas": True, "prediction_type": "flow_prediction", "lower_order_final": lowers}
    if name != "SASolverScheduler":
        config |= {"final_sigmas_type": "sigma_min", "solver_order": 2}
    ends = []
    for scheduler in pair(name, config):
        scheduler.set_timesteps(3)
        x, results = torch.ones(SHAPE), []
        try:
            for t in scheduler.timesteps:
                x = scheduler.step(0.5 * x, t, x).prev_sample
                results.append(x)
        except (AssertionError, IndexError) as error:
            ends.append((type(error), len(results)))
    assert len(ends) == 2
    assert ends[0] == ends[1]


@pytest.mark.parametrize("steps", [4, 5, 10])
@pytest.mark.parametrize("order", [2, 3])
def test_singlestep_that_reads_no_earlier_output(order: int, steps: int) -> None:
    """Halfway in lambda the midpoint method has no weight for the first output; the steps are counted all the same."""
    config = {"use_exponential_sigmas": True, "solver_order": order}
    assert_parity("DPMSolverSinglestepScheduler", config, steps=steps)


@pytest.mark.parametrize("begin", [None, 0])
def test_flow_of_one_step_with_a_terminal_shift(begin: int | None) -> None:
    """diffusers divides by zero: no level is a number, and neither is a timestep."""
    errors, results = [], []
    for scheduler in pair("FlowMatchEulerDiscreteScheduler", {"shift_terminal": 0.1}):
        scheduler.set_timesteps(1)
        if begin is not None:
            scheduler.set_begin_index(begin)
        x = torch.ones(SHAPE)
        try:
            results.append(scheduler.step(x, scheduler.timesteps[0], x).prev_sample)
        except IndexError as error:
            errors.append(type(error))
    assert len(errors) in (0, 2)
    assert all(result.isnan().all() for result in results)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("skips", [True, False])
def test_pndm_on_the_cosine_schedule(skips: bool, kind: str) -> None:
    config = {**COSINE, "prediction_type": kind, "skip_prk_steps": skips}
    assert_parity("PNDMScheduler", config, steps=20, model=normal_network)


@pytest.mark.parametrize("name", ONE_CALL + TWO_CALLS)
def test_usual_schedules_have_a_row_for_each_step(name: str) -> None:
    for config in ({}, {"beta_schedule": "scaled_linear", "beta_end": 0.012}):
        ours, _ = pair(name, config)
        ours.set_timesteps(10)
        x = torch.ones(SHAPE)
        for t in ours.timesteps:
            x = ours.step(network(ours.scale_model_input(x, t), t), t, x).prev_sample
        assert not ours._theirs.intersection(range(len(ours.timesteps)))


MULTISTEP = (
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)


@pytest.mark.parametrize(
    ("name", "config", "steps"),
    [
        ("UniPCMultistepScheduler", {"timestep_spacing": "trailing", "use_karras_sigmas": True}, 20),
        ("UniPCMultistepScheduler", {"timestep_spacing": "trailing", "use_karras_sigmas": True}, 50),
        ("UniPCMultistepScheduler", {"use_exponential_sigmas": True}, 33),
        ("DPMSolverSinglestepScheduler", {"use_exponential_sigmas": True, "solver_order": 3}, 4),
    ],
)
def test_flow_predictions_on_the_cosine_schedule(name: str, config: dict[str, object], steps: int) -> None:
    """Earlier outputs are thousands of times larger than the state, and later states are what is left of it."""
    config = {**COSINE, "prediction_type": "flow_prediction", **config}
    assert_parity(name, config, steps=steps, begin=0, model=bounded_network)


@pytest.mark.parametrize("steps", [2, 3, 7, 20])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_on_the_cosine_schedule(name: str, kind: str, steps: int) -> None:
    for model in (bounded_network, scaled_network):
        assert_parity(name, {**COSINE, "prediction_type": kind}, steps=steps, model=model)


@pytest.mark.parametrize("levels", ["use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"])
def test_stochastic_run_that_is_called_with_earlier_timesteps(levels: str) -> None:
    """From the second of equal timesteps on, each index has the timestep before its own, and so its tau."""
    ours, theirs = pair("SASolverScheduler", {**COSINE, levels: True, "timestep_spacing": "trailing"})
    steps = 10
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(steps)
    draws = [torch.Generator().manual_seed(2) for _ in range(2)]
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))
    for t in theirs.timesteps[: steps - 1]:
        m = bounded_network(x, t)
        their, our = (
            scheduler.step(m, t, x, generator=draw).prev_sample
            for scheduler, draw in zip((theirs, ours), draws, strict=True)
        )
        assert (our - their).norm() < 1e-5 * their.norm()
        x = their


STABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}


@pytest.mark.parametrize("steps", [5, 20, 50])
@pytest.mark.parametrize(
    "config",
    [
        {**STABLE, "timestep_spacing": "leading"},
        {**STABLE, "timestep_spacing": "leading", "use_karras_sigmas": True},
        {**STABLE, "timestep_spacing": "trailing", "prediction_type": "v_prediction"},
        FLOW,
    ],
    ids=["stable diffusion", "karras", "v", "flow"],
)
@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
def test_usual_multistep_runs_have_a_row_for_each_step(name: str, config: dict[str, object], steps: int) -> None:
    ours, _ = pair(name, config)
    ours.set_timesteps(steps)
    x = torch.ones(SHAPE)
    ours.step(x, ours.timesteps[0], x)
    assert len(ours._steps.table) == len(ours.timesteps)
    assert not ours._steps.theirs


def nearly_the_noise(x: Tensor, t: Tensor) -> Tensor:
    """Almost its input, so that near pure noise x - sigma m is the difference of nearly equal numbers."""
    return x * t / (t + 1)


@pytest.mark.parametrize(("spacing", "steps"), [("trailing", 1), ("trailing", 50), ("leading", 10)])
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler"])
def test_differences_near_pure_noise(name: str, spacing: str, steps: int) -> None:
    for clip in (True, False):
        config = {"timestep_spacing": spacing, "clip_sample": clip}
        assert_parity(name, config, steps=steps, model=nearly_the_noise)


@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler", "UnCLIPScheduler"])
def test_differences_of_distilled_models_near_pure_noise(name: str) -> None:
    for steps in (2, 5):
        assert_parity(name, steps=steps, model=nearly_the_noise)


def test_bounded_data_after_a_far_step() -> None:
    config = {**COSINE, "beta_end": 0.012, "use_beta_sigmas": True, "clip_sample": True}
    for steps in (2, 3):
        assert_parity("HeunDiscreteScheduler", config, steps=steps)
    config = {**COSINE, "num_train_timesteps": 100, "use_karras_sigmas": True, "prediction_type": "sample"}
    assert_parity("HeunDiscreteScheduler", config, steps=2, model=normal_network)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once_where_float32_would_keep_no_digits(dtype: torch.dtype) -> None:
    """D = x - sigma m with m in half precision, whose product with sigma diffusers rounds."""
    config = {"beta_schedule": "scaled_linear", "beta_end": 0.012, "interpolation_type": "log_linear"}
    for name, options in (("EulerDiscreteScheduler", config), ("EulerAncestralDiscreteScheduler", COSINE)):
        ours, _ = pair(name, options)
        ours.set_timesteps(2 if options is COSINE else 1)
        x = start(ours, SHAPE, dtype)
        m = network(ours.scale_model_input(x, ours.timesteps[0]), None).to(dtype)
        data = ours.step(m, ours.timesteps[0], x).pred_original_sample
        exact = x.double() - float(ours.sigmas[0]) * m.double()
        assert ours._theirs
        assert relative(data, exact) < 1e-6


@pytest.mark.parametrize("steps", [4, 7])
@pytest.mark.parametrize("levels", ["use_karras_sigmas", "use_beta_sigmas"])
def test_data_where_the_stochastic_solver_calls_the_network_halfway(levels: str, steps: int) -> None:
    """diffusers rounds the level of the second call, and D = x - sigma m is a small part of x there."""
    config = {**COSINE, levels: True, "num_train_timesteps": 200, "noise_sampler_seed": 3}
    assert_parity("DPMSolverSDEScheduler", config, steps=steps, model=scaled_network)


@pytest.mark.parametrize("begin", [1, 2])
def test_v_prediction_of_which_little_is_left_of_the_state(begin: int) -> None:
    for name, train, steps in (("EulerDiscreteScheduler", 1000, 7), ("EulerDiscreteScheduler", 200, 4)):
        config = {
            **COSINE,
            "use_karras_sigmas": True,
            "prediction_type": "v_prediction",
            "num_train_timesteps": train,
            "timestep_spacing": "trailing" if steps == 7 else "linspace",
        }
        assert_parity(name, config, steps=steps, begin=begin, model=bounded_network)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_two_calls_in_half_precision_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    ours, _ = pair(name, COSINE)
    ours.set_timesteps(2)
    x = start(ours, SHAPE, dtype)
    m = network(ours.scale_model_input(x, ours.timesteps[0]), None).to(dtype)
    result = ours.step(m, ours.timesteps[0], x).pred_original_sample
    exact = x.double() - float(ours.sigmas[0]) * m.double()
    assert ours._theirs
    assert relative(result, exact) <= relative(exact.to(dtype), exact) + 1e-6
