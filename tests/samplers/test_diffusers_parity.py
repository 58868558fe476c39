"""Every method against diffusers' scheduler at every step, float32, relative error 1e-5, the same noise on both sides.

`methods()[name].diffusers` holds the options that give each class's own defaults; their float32 schedule is taken over
value for value, and what our float64 one changes is in test_peer_differences.py.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers_peer import SCHEDULES, assert_parity, differs, relative, scheduler_for, table_for
from interpret import trajectory

from fastdiff import samplers, schedules
from fastdiff.ops.row import INPUTS, NEW_X

# Methods whose classes take every prediction and step count; the others have files of their own.
GENERAL = ("ddpm", "ddim", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_sde")
# Their ancestral class has no sample prediction.
PAIRS = [
    (method, prediction)
    for method in GENERAL
    for prediction in ("epsilon", "v", "sample")
    if (method, prediction) != ("euler_ancestral", "sample")
]


@pytest.mark.parametrize(("method", "prediction"), PAIRS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_default_configuration(method, schedule, prediction):
    for steps in (2, 7, 20, 50):
        scheduler = scheduler_for(method, schedule, prediction)
        assert_parity(table_for(method, scheduler, prediction, steps), scheduler)


@pytest.mark.parametrize("steps", [1, 7, 20, 333])
def test_flow_euler_default_configuration(steps):
    scheduler = scheduler_for("flow_euler", "", "flow")
    assert_parity(table_for("flow_euler", scheduler, "flow", steps), scheduler)


@pytest.mark.parametrize(
    ("method", "config", "options", "step_options"),
    [
        ("ddpm", {"variance_type": "fixed_large"}, {"variance": "fixed_large"}, {}),
        ("ddpm", {"clip_sample": False}, {"clip": None}, {}),
        ("ddpm", {"clip_sample_range": 0.7}, {"clip": 0.7}, {}),
        ("ddpm", {"timestep_spacing": "trailing"}, {"spacing": "trailing"}, {}),
        ("ddpm", {"timestep_spacing": "linspace"}, {"spacing": "linspace"}, {}),
        ("ddim", {}, {"eta": 0.5}, {"eta": 0.5}),
        ("ddim", {"clip_sample": False}, {"clip": None, "eta": 1.0}, {"eta": 1.0}),
        ("ddim", {}, {"clipped_epsilon": True}, {"use_clipped_model_output": True}),
        ("ddim", {"timestep_spacing": "trailing"}, {"spacing": "trailing"}, {}),
        ("ddim", {"timestep_spacing": "linspace"}, {"spacing": "linspace"}, {"eta": 0.0}),
        ("ddim", {"steps_offset": 1, "set_alpha_to_one": False}, {"steps_offset": 1, "final_sigma": "schedule"}, {}),
        ("ddim", {"set_alpha_to_one": False}, {"endpoint": True, "final_sigma": "schedule"}, {}),
        ("euler", {"timestep_spacing": "trailing"}, {"spacing": "trailing", "integer": True}, {}),
        (
            "euler",
            {"timestep_spacing": "leading", "steps_offset": 1},
            {"spacing": "leading", "integer": True, "steps_offset": 1, "initial": "unit"},
            {},
        ),
        ("euler", {"use_karras_sigmas": True}, {"spacing": "karras"}, {}),
        ("euler", {"use_exponential_sigmas": True}, {"spacing": "exponential"}, {}),
        ("euler", {"final_sigmas_type": "sigma_min"}, {"endpoint": True, "final_sigma": "schedule"}, {}),
        ("euler_ancestral", {"timestep_spacing": "trailing"}, {"spacing": "trailing", "integer": True}, {}),
        ("heun", {"use_karras_sigmas": True}, {"spacing": "karras"}, {}),
        ("heun", {"clip_sample": True}, {"clip": 1.0}, {}),
        ("heun", {"timestep_spacing": "trailing"}, {"spacing": "trailing", "integer": True}, {}),
        ("dpmpp_2m", {"solver_type": "heun"}, {"solver": "heun"}, {}),
        ("dpmpp_2m", {"timestep_spacing": "trailing"}, {"spacing": "trailing"}, {}),
        ("dpmpp_2m", {"timestep_spacing": "leading", "steps_offset": 1}, {"spacing": "leading", "steps_offset": 1}, {}),
        ("dpmpp_2m", {"use_karras_sigmas": True}, {"spacing": "karras", "integer": True}, {}),
        (
            "dpmpp_2m",
            {"final_sigmas_type": "sigma_min", "lower_order_final": False},
            {"final_sigma": "schedule", "lower_order_final": False},
            {},
        ),
        ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}, {"final_sigma": "schedule"}, {}),
        ("dpmpp_2m_sde", {"solver_type": "heun"}, {"solver": "heun"}, {}),
        ("dpmpp_2m_sde", {"timestep_spacing": "trailing"}, {"spacing": "trailing"}, {}),
    ],
    ids=str,
)
def test_configuration(method, config, options, step_options):
    for steps in (7, 20):
        scheduler = scheduler_for(method, "scaled_linear", "v", **config)
        chosen = dict(options)
        if chosen.get("spacing") in ("karras", "exponential"):
            # Options of even timesteps mean nothing here; the class's defaults set them.
            chosen |= {"interpolation": None, "endpoint": None, "integer": chosen.get("integer")}
        elif chosen.get("spacing") == "trailing":
            chosen |= {"endpoint": None, "interpolation": None}
        assert_parity(table_for(method, scheduler, "v", steps, **chosen), scheduler, **step_options)


@pytest.mark.parametrize("steps", [7, 20])
def test_dpm_solver_on_a_flow_schedule(steps):
    """Their flow sigmas run from 0.999 to 0; they call the network at sigma, rounded down to a thousandth."""
    scheduler = scheduler_for("dpmpp_2m", "linear", "flow", use_flow_sigmas=True)
    scheduler.set_timesteps(steps)
    ends = {"sigma_max": 0.999, "sigma_min": 1e-12, "endpoint": False}
    schedule = schedules.flow(1000)
    table = samplers.build("dpmpp_2m", schedule=schedule, steps=steps, prediction="flow", spacing="linspace", **ends)
    np.testing.assert_allclose(table.grid.sigmas, scheduler.sigmas, rtol=1e-6)
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    outputs = [0.5 * torch.randn(2, 5, generator=torch.Generator().manual_seed(i)) for i in range(steps)]
    remaining = iter(outputs)
    states = trajectory(lambda *_: next(remaining).double().numpy(), table, x.double().numpy())
    for t, m, ours in zip(scheduler.timesteps, outputs, states, strict=True):
        x = scheduler.step(m, t, x).prev_sample
        assert relative(torch.from_numpy(ours), x) < 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("method", ["ddpm", "ddim"])
def test_float64_where_their_class_can(method, prediction):
    """With float64 arrays and tensors their classes compute in float64: every step count, to the last digits."""
    for steps in (1, 20, 333, 600, 1000):
        scheduler = scheduler_for(method, "linear", prediction)
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.one = scheduler.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float64)
        table = table_for(method, scheduler, prediction, steps)
        scheduler.set_timesteps(steps)
        assert table.timesteps.tolist() == scheduler.timesteps.tolist()
        generator, twin = (torch.Generator().manual_seed(1) for _ in range(2))
        x = torch.randn(4, 9, generator=generator, dtype=torch.float64)
        twin.set_state(generator.get_state())

        def model(y, t):
            return 0.9 * np.sin(y + 0.01 * t) + 0.1 * y

        def draw(_, source=twin, like=x):
            return torch.randn(like.shape, generator=source, dtype=torch.float64).numpy()

        states = trajectory(model, table, x.numpy(), draw)
        for t, ours in zip(scheduler.timesteps, states, strict=True):
            m = torch.from_numpy(model(x.numpy(), float(t)))
            x = scheduler.step(m, t, x, generator=generator).prev_sample
            assert np.abs(ours - x.numpy()).max() < 1e-10 * max(1.0, np.abs(ours).max())


def test_a_wrong_coefficient_is_seen():
    """The comparison has power: 0.1 % in one small coefficient of one row fails that row."""
    scheduler = scheduler_for("dpmpp_2m", "linear", "v")
    table = table_for("dpmpp_2m", scheduler, "v", 7)
    rows = table.rows.copy()
    rows[3, NEW_X][INPUTS.index("hist1")] *= 1.001
    scheduler.set_timesteps(7)
    assert differs(replace(table, rows=rows), scheduler) == [3]
