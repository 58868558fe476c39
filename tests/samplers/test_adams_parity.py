"""UniPC, DEIS and SA-Solver beside diffusers' classes at every step: in float32, and in float64 to 1e-9.

Their classes take every coefficient from `sigmas`; with our float64 ones in their place only the formulas are compared.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_peer import IN_FLOAT64, assert_parity, network, schedule_of, scheduler_for, table_for
from interpret import trajectory

from fastdiff import samplers, schedules
from fastdiff.ops.row import INPUTS, NEW_ANCHOR, NEW_X
from fastdiff.samplers import Grid, StepTable
from fastdiff.samplers.problem import Problem
from fastdiff.schedules import Schedule

SHAPE = (2, 3, 4, 4)
STEPS = (1, 2, 3, 7, 20, 50)
PREDICTIONS = ("epsilon", "v", "sample")
SCHEDULES = ("linear", "scaled_linear", "cosine")
# A last sigma of 0 makes their noise form and their bh1 NaN.
END = {"final_sigmas_type": "sigma_min"}, {"final_sigma": "schedule"}
NOISE = {"predict_x0": False, **END[0]}, {"predict": "noise", **END[1]}
KARRAS = {"use_karras_sigmas": True}, {"spacing": "karras", "integer": True, "endpoint": None}
# Their other classes repeat the last sigma.
KARRAS_REPEATED = {"use_karras_sigmas": True}, {**KARRAS[1], "endpoint": True, "final_sigma": "schedule"}
TRAILING = {"timestep_spacing": "trailing"}, {"spacing": "trailing", "endpoint": None}
LEADING = {"timestep_spacing": "leading", "steps_offset": 1}, {"spacing": "leading", "steps_offset": 1}

CONFIGURATIONS = {
    "unipc": [
        *(({"solver_order": n}, {"order": n}) for n in (1, 3)),
        *(
            ({**form[0], "solver_order": n, "solver_type": b}, {**form[1], "order": n, "variant": b})
            for n in (1, 2, 3)
            for b in ("bh1", "bh2")
            for form in (END, NOISE)
        ),
        ({"disable_corrector": [0, 1, 4]}, {"corrector": [0, 1, 4]}),
        ({"disable_corrector": list(range(50)), "solver_order": 3}, {"corrector": False, "order": 3}),
        *(
            (
                {**form[0], "lower_order_final": False, "solver_order": 3},
                {**form[1], "lower_order_final": False, "order": 3},
            )
            for form in (END, NOISE)
        ),
        KARRAS,
        TRAILING,
        LEADING,
    ],
    "deis": [
        *(({"solver_order": n}, {"order": n}) for n in (1, 2, 3)),
        ({"solver_order": 3, "lower_order_final": False}, {"order": 3, "lower_order_final": False}),
        KARRAS_REPEATED,
        TRAILING,
        LEADING,
    ],
    "sa_solver": [
        *(
            ({"predictor_order": p, "corrector_order": c}, {"predictor_order": p, "corrector_order": c})
            for p, c in ((1, 1), (1, 2), (2, 1), (3, 4), (4, 3), (2, 4))
        ),
        *(
            (
                {"algorithm_type": "noise_prediction", "predictor_order": p, "corrector_order": c},
                {"predict": "noise", "predictor_order": p, "corrector_order": c},
            )
            for p, c in ((1, 1), (2, 2), (3, 4))
        ),
        ({"tau_func": lambda t: 0.0}, {"tau": 0.0}),
        ({"tau_func": lambda t: 0.7}, {"tau": 0.7, "tau_timesteps": None}),
        ({"lower_order_final": False, "predictor_order": 3}, {"lower_order_final": False, "predictor_order": 3}),
        KARRAS_REPEATED,
        TRAILING,
        LEADING,
    ],
}


FLOWS = {
    "unipc": [
        ({}, {}),
        ({"solver_order": 3, "flow_shift": 3.0}, {"order": 3}),
        ({"solver_type": "bh1", "final_sigmas_type": "sigma_min"}, {"variant": "bh1"}),
    ],
    "deis": [({}, {}), ({"solver_order": 3, "flow_shift": 3.0}, {"order": 3})],
    "sa_solver": [
        ({}, {"tau_timesteps": (200, 800)}),
        (
            {"predictor_order": 3, "corrector_order": 3, "tau_func": lambda _: 1.0},
            {"predictor_order": 3, "corrector_order": 3},
        ),
    ],
}


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", IN_FLOAT64)
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_default_configuration_in_float32(method, schedule, prediction):
    """Without cosine, at whose noisy end sigma / alpha is 20000 and float32 leaves both sides three digits."""
    for steps in (2, 7, 20, 50):
        scheduler = scheduler_for(method, schedule, prediction)
        assert_parity(table_for(method, scheduler, prediction, steps), scheduler)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("method", IN_FLOAT64)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_default_configuration_in_float64(method, schedule, prediction):
    for steps in STEPS:
        scheduler = scheduler_for(method, schedule, prediction)
        table = table_for(method, scheduler, prediction, steps)
        scheduler.set_timesteps(steps)
        assert_same(table, scheduler, schedule_of(scheduler), table.grid.noise_ratios)


@pytest.mark.parametrize(
    ("method", "config", "options"),
    [
        pytest.param(method, *case, id=f"{method}-{case[1]}")
        for method, listed in CONFIGURATIONS.items()
        for case in listed
    ],
)
def test_configuration_in_float64(method, config, options):
    for steps in (3, 7, 20):
        scheduler = scheduler_for(method, "scaled_linear", "v", **config)
        table = table_for(method, scheduler, "v", steps, **options)
        scheduler.set_timesteps(steps)
        assert_same(table, scheduler, schedule_of(scheduler), table.grid.noise_ratios)


@pytest.mark.parametrize(
    ("config", "options"),
    [({"predict_x0": False}, {"predict": "noise"}), ({"solver_type": "bh1"}, {"variant": "bh1"})],
    ids=["noise", "bh1"],
)
def test_unipc_ends_at_the_data_where_theirs_is_nan(config, options):
    """Their last sigma of 0 makes h infinite, and 0 times infinity of it."""
    scheduler = scheduler_for("unipc", "linear", "v", **config)
    table = table_for("unipc", scheduler, "v", 7, **options)
    scheduler.set_timesteps(7)
    *_, (ours, theirs) = states(table, scheduler, schedule_of(scheduler))
    assert np.isnan(theirs).all()
    assert np.abs(ours).max() < 2.0


@pytest.mark.parametrize(
    ("method", "config", "options"),
    [pytest.param(method, *case, id=f"{method}-{case[1]}") for method, listed in FLOWS.items() for case in listed],
)
def test_flow_sigmas(method, config, options):
    """UniPC's start at 1 - 1e-6, the others' at 0.999, and they repeat the last one."""
    for steps in (7, 20):
        scheduler = scheduler_for(method, "linear", "flow", use_flow_sigmas=True, **config)
        scheduler.set_timesteps(steps)
        sigmas = scheduler.sigmas.double().numpy()
        schedule = schedules.flow(1000)
        problem = Problem(schedule, Grid(1000.0 * sigmas, 1.0 - sigmas, sigmas), "flow", None)
        assert_same(samplers.find(method).rows(problem, **options), scheduler, schedule, sigmas)


@pytest.mark.parametrize("method", IN_FLOAT64)
def test_a_wrong_coefficient_is_seen(method):
    scheduler = scheduler_for(method, "linear", "v")
    table = table_for(method, scheduler, "v", 7)
    block, name = (NEW_X, "hist1") if method == "deis" else (NEW_ANCHOR, "anchor")
    rows = table.rows.copy()
    rows[2, block][INPUTS.index(name)] *= 1.0 + 1e-7
    scheduler.set_timesteps(7)
    with pytest.raises(AssertionError):
        assert_same(replace(table, rows=rows), scheduler, schedule_of(scheduler), table.grid.noise_ratios)


def assert_same(table: StepTable, scheduler: Any, schedule: Schedule, sigmas: np.ndarray) -> None:
    """Timesteps agree, and with our `sigmas` in place of their float32 ones the states do, relative error 1e-9."""
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), rtol=3e-6, atol=1e-7)
    np.testing.assert_allclose(np.floor(table.timesteps + 1e-3), scheduler.timesteps.numpy(), atol=1e-4)
    scheduler.sigmas = torch.from_numpy(sigmas.copy())
    for index, (ours, theirs) in enumerate(states(table, scheduler, schedule)):
        error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        assert error < 1e-9, f"row {index}: relative error {error:.1e}"


@pytest.mark.parametrize(
    ("method", "config", "options"),
    [
        ("unipc", {"solver_order": 3, "disable_corrector": [0, 9, 12]}, {"order": 3, "corrector": [0, 9, 12]}),
        ("deis", {"solver_order": 3}, {"order": 3}),
        ("sa_solver", {"predictor_order": 3, "corrector_order": 4}, {"predictor_order": 3, "corrector_order": 4}),
    ],
    ids=["unipc", "deis", "sa_solver"],
)
def test_start_in_the_middle(method, config, options):
    """With `strength` orders grow from 1 at the first step taken."""
    scheduler = scheduler_for(method, "scaled_linear", "v", **config)
    whole, table = (table_for(method, scheduler, "v", 20, strength=kept, **options) for kept in (None, 0.6))
    scheduler.set_timesteps(20)
    scheduler.sigmas = torch.from_numpy(whole.grid.noise_ratios)
    scheduler.set_begin_index(table.grid.skipped)
    assert len(table) == 12
    for ours, theirs in states(table, scheduler, schedule_of(scheduler)):
        assert np.linalg.norm(ours - theirs) < 1e-9 * np.linalg.norm(theirs)


def states(table: StepTable, scheduler: Any, schedule: Schedule) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The state after each step on both sides, with the network's output at their state and the same noise for both."""
    generator, twin = (torch.Generator().manual_seed(7) for _ in range(2))
    options = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    m = x

    def draw(_: int) -> np.ndarray:
        return torch.randn(SHAPE, generator=twin, dtype=torch.float64).numpy()

    ours = trajectory(lambda *_: m.numpy(), table, x.numpy(), draw)
    for index, t in enumerate(scheduler.timesteps[table.grid.skipped :]):
        m = network(schedule, table.prediction, x, float(table.timesteps[index]))
        twin.set_state(generator.get_state())
        x = scheduler.step(m, t, x, **options).prev_sample
        yield next(ours), x.numpy()
