"""DPM-Solver's methods against diffusers' schedulers in every configuration, and where ours differ on purpose."""

import diffusers
import numpy as np
import pytest
import torch
from convergence import error
from diffusers_peer import SCHEDULES, assert_parity, differs, relative, scheduler_for, table_for
from interpret import trajectory

from fastdiff import samplers, schedules

FULL = {"lower_order_final": False}
MIN = {"final_sigmas_type": "sigma_min"}
END = {"final_sigma": "schedule"}
MULTISTEP = [
    ("dpmpp_2m", {"solver_order": 1}, {"order": 1}),
    ("dpmpp_2m", {"euler_at_final": True, **MIN, **FULL}, {"euler_at_final": True, **END, **FULL}),
    ("dpmpp_2m_sde", {"solver_order": 1}, {"order": 1}),
    ("dpmpp_2m_sde", MIN, END),
    ("dpmpp_2m_sde", {"euler_at_final": True, **MIN, **FULL}, {"euler_at_final": True, **END, **FULL}),
    ("dpmpp_3m", MIN, END),
    ("dpmpp_3m", {**MIN, **FULL}, {**END, **FULL}),
    ("dpmpp_3m", {"euler_at_final": True, **MIN}, {"euler_at_final": True, **END}),
    ("dpmpp_3m", {"euler_at_final": True, **MIN, **FULL}, {"euler_at_final": True, **END, **FULL}),
    ("dpmpp_3m", {"solver_type": "heun"}, {"solver": "heun"}),
    ("dpmpp_3m_sde", MIN, END),
    ("dpmpp_3m_sde", {"solver_type": "heun", **MIN, **FULL}, {"solver": "heun", **END, **FULL}),
    ("dpm_solver", {"solver_order": 1}, {"order": 1}),
    ("dpm_solver", {"solver_order": 3}, {"order": 3}),
    ("dpm_solver", {"solver_order": 3, **FULL}, {"order": 3, **FULL}),
    ("dpm_solver", {"solver_type": "heun"}, {"solver": "heun"}),
    ("dpm_solver", {"euler_at_final": True, **FULL}, {"euler_at_final": True, **FULL}),
    ("dpm_solver_sde", {"solver_order": 1}, {"order": 1}),
    ("dpm_solver_sde", {"solver_type": "heun"}, {"solver": "heun"}),
    ("dpm_solver_sde", {"euler_at_final": True, **FULL}, {"euler_at_final": True, **FULL}),
]
GRIDS = {
    "trailing": ({"timestep_spacing": "trailing"}, {"endpoint": None}),
    "leading": ({"timestep_spacing": "leading", "steps_offset": 1}, {"steps_offset": 1}),
    "karras": ({"use_karras_sigmas": True}, {"integer": True, "endpoint": None}),
}
# diffusers' "sde-dpmsolver++" is an option of theirs and a method of ours.
SINGLESTEP = {
    "dpmsolver++": ("dpmpp_singlestep", {}),
    "dpmsolver": ("dpm_solver_singlestep", {}),
    "sde-dpmsolver++": (
        "dpmpp_sde",
        {"integer": None, "interpolation": None, "endpoint": False, "points": "grid", "curvature": "offset"},
    ),
}
ENDS = {
    "zero": ({}, {}),
    "min": (MIN, END),
    "lowered": (MIN | {"lower_order_final": True}, END | {"lower_order_final": True}),
}


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "method",
    ["dpmpp_3m", "dpmpp_3m_sde", "dpm_solver", "dpm_solver_sde", "dpm_solver_singlestep", "dpmpp_singlestep"],
)
def test_default_configuration(method, schedule, prediction):
    for steps in (2, 7, 20, 50):
        scheduler = scheduler_for(method, schedule, prediction)
        assert_parity(table_for(method, scheduler, prediction, steps), scheduler)


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize(("method", "config", "options"), MULTISTEP, ids=str)
def test_multistep(method, config, options, prediction):
    for steps in (1, 2, 3, 8, 16):
        scheduler = scheduler_for(method, "linear", prediction, **config)
        assert_parity(table_for(method, scheduler, prediction, steps, **options), scheduler)


@pytest.mark.parametrize("spacing", GRIDS)
@pytest.mark.parametrize("method", ["dpmpp_3m", "dpmpp_3m_sde", "dpm_solver", "dpm_solver_sde"])
def test_multistep_on_other_grids(method, spacing):
    config, options = GRIDS[spacing]
    if spacing == "karras" and method.startswith("dpm_solver"):
        # Theirs reaches sigma_min one step early and repeats it.
        options = {**options, "endpoint": True}
    scheduler = scheduler_for(method, "scaled_linear", "v", **config)
    assert_parity(table_for(method, scheduler, "v", 10, spacing=spacing, **options), scheduler)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", SINGLESTEP)
def test_singlestep(algorithm, order, solver, end):
    method, ours = SINGLESTEP[algorithm]
    config, options = ENDS[end]
    if algorithm == "dpmsolver" and end == "zero":
        with pytest.raises(ValueError, match="final_sigmas_type"):
            scheduler_for("dpmpp_singlestep", "linear", "v", algorithm_type=algorithm, **config)
        return
    config = {"solver_order": order, "solver_type": solver, "algorithm_type": algorithm, **config}
    for steps in (1, 2, 3, 6, 13, 20):
        scheduler = scheduler_for("dpmpp_singlestep", "linear", "v", **config)
        table = table_for(method, scheduler, "v", steps, order=order, solver=solver, **ours, **options)
        assert_parity(table, scheduler)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("dpmpp_2m", {}),
        ("dpmpp_2m_sde", {}),
        ("dpmpp_3m", {"curvature": "half"}),
        ("dpmpp_3m_sde", {"curvature": "half_offset", "solver": "midpoint"}),
        ("dpmpp_singlestep", {"points": "grid"}),
        ("dpmpp_singlestep", {"points": "grid", "order": 3}),
    ],
    ids=str,
)
def test_flow_sigmas(method, options, shift):
    """Their sigmas are taken as they are; their timesteps are these times 1000, rounded down."""
    config = {"solver_order": options["order"]} if "order" in options else {}
    scheduler = scheduler_for(method, "linear", "flow", use_flow_sigmas=True, flow_shift=shift, **config)
    scheduler.set_timesteps(10)
    levels = {"sigmas": scheduler.sigmas.double().tolist()}
    table = samplers.build(method, schedule=schedules.flow(1000), prediction="flow", **levels, **options)
    generator, twin = (torch.Generator().manual_seed(7) for _ in range(2))
    x = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    outputs = [0.5 * torch.randn(2, 5, generator=torch.Generator().manual_seed(i)) for i in range(10)]
    remaining = iter(outputs)
    states = trajectory(
        lambda *_: next(remaining).double().numpy(), table, x.double().numpy(), lambda _: _draw(twin, x.shape)
    )
    for t, m, ours in zip(scheduler.timesteps, outputs, states, strict=True):
        x = scheduler.step(m, t, x, generator=generator).prev_sample
        assert relative(torch.from_numpy(ours), x) < 1e-5


def _draw(generator: torch.Generator, shape: torch.Size) -> np.ndarray:
    return torch.randn(shape, generator=generator).double().numpy()


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize(
    ("algorithm", "order"), [("dpmsolver++", 1), ("dpmsolver++", 2), ("dpmsolver++", 3), ("sde-dpmsolver++", 2)]
)
def test_edm(algorithm, order, solver):
    """EDMDPMSolverMultistepScheduler: sigma = r, alpha = 1, the network's input and output scaled as in the paper.

    Its third order of the SDE raises an error of Python's.
    """
    config = {"algorithm_type": algorithm, "solver_order": order, "solver_type": solver}
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(**config)
    scheduler.set_timesteps(12)
    schedule = schedules.edm(1000, sigma_min=0.002, sigma_max=80.0)
    sde = "_sde" if algorithm.startswith("sde") else ""
    options = {"order": order, "solver": solver}
    if order == 3:
        options = {"solver": solver, "curvature": "half"}
    table = samplers.build(
        f"dpmpp_{3 if order == 3 else 2}m{sde}",
        schedule=schedule,
        steps=12,
        prediction="edm",
        spacing="karras",
        **options,
    )
    np.testing.assert_allclose(table.grid.sigmas, scheduler.sigmas, rtol=1e-5)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps, rtol=1e-5, atol=1e-5)
    generator, twin = (torch.Generator().manual_seed(7) for _ in range(2))
    x = 80.0 * torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    state, inputs = x.double().numpy(), []

    def model(given, t):
        inputs.append(given)
        return np.tanh(given + 0.1 * t)

    states = trajectory(model, table, state, lambda _: _draw(twin, x.shape))
    for t, ours in zip(scheduler.timesteps, states, strict=True):
        given = scheduler.scale_model_input(x, t)
        assert relative(torch.from_numpy(inputs[-1]), given) < 1e-5
        x = scheduler.step(torch.tanh(given + 0.1 * t), t, x, generator=generator).prev_sample
        assert relative(torch.from_numpy(ours), x) < 1e-5


def test_their_third_order_halves_the_curvature():
    """Their second difference lacks a factor of 2, and so the method is of order 2."""
    scheduler = scheduler_for("dpmpp_3m", "linear", "v")
    scheduler.set_timesteps(20)
    assert differs(table_for("dpmpp_3m", scheduler, "v", 20, curvature="exact"), scheduler) == [*range(3, 19)]
    for method, options in (("dpmpp_3m", {}), ("dpm_solver", {"order": 3})):
        slopes = {}
        for curvature in ("exact", "half"):
            errors = [
                error(method, schedules.linear(1000), "v", steps, curvature=curvature, **FULL, **options)
                for steps in (320, 640)
            ]
            slopes[curvature] = np.log2(errors[0] / errors[1])
        assert slopes["exact"] > 2.94
        assert slopes["half"] == pytest.approx(2.0, abs=0.06)


def test_their_third_order_sde_has_a_wrong_sign():
    """What is left of it without noise is of order 1, and grows from step to step where there are many."""
    scheduler = scheduler_for("dpmpp_3m_sde", "linear", "v")
    scheduler.set_timesteps(20)
    assert differs(table_for("dpmpp_3m_sde", scheduler, "v", 20, curvature="half"), scheduler) == [*range(2, 19)]
    options = {"eta": 0.0, "curvature": "half_offset", **FULL}
    errors = [error("dpmpp_3m_sde", schedules.linear(1000), "v", steps, **options) for steps in (80, 160, 640)]
    assert np.log2(errors[0] / errors[1]) < 1.2
    assert errors[2] > errors[1]
