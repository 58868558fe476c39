"""DPM-Solver's states are at the noise levels that their rows name, from every kind of start, for any number of steps.

Where the denoiser always gives the same x_0, a state is exactly s x_0 + a sum of the start's noise and the fresh ones,
whose standard deviations make up the level: that is what inpainting and a start from an image rely on.
"""

from functools import partial

import numpy as np
import pytest
from interpret import trajectory

from fastdiff import samplers, schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import KNOWN, NEW_X
from fastdiff.parameterization import target

SCHEDULES = {
    "linear": (schedules.linear(1000), "epsilon", {}),
    "cosine": (schedules.cosine(1000), "v", {"spacing": "karras"}),
    "no-signal": (schedules.zero_terminal_snr(schedules.scaled_linear(1000)), "v", {}),
    "flow": (schedules.flow(1000, shift=3.0), "flow", {}),
    "flow-sample": (schedules.flow(1000), "sample", {}),
    "ve": (schedules.ve(1000, sigma_max=50.0), "score", {}),
    "edm": (schedules.edm(1000), "edm", {}),
    "sub_vp": (schedules.sub_vp_sde(1000), "epsilon", {}),
}
CASES = {
    "dpmpp_2m": {},
    "dpmpp_2m-churn": {"s_churn": 3.0, "s_tmax": 20.0},
    "dpmpp_2m_sde": {},
    "dpmpp_2m_sde-half": {"eta": 0.5, "solver": "heun"},
    "dpmpp_3m": {},
    "dpmpp_3m-churn": {"s_churn": 2.0, "s_tmax": 5.0},
    "dpmpp_3m_sde": {},
    "dpm_solver": {},
    "dpm_solver-order3": {"order": 3},
    "dpm_solver_singlestep": {},
    "dpm_solver_singlestep-order3": {"order": 3, "eta": 0.6},
    "dpm_solver_singlestep-grid": {"order": 3, "points": "grid"},
    "dpmpp_singlestep": {"order": 3},
    "dpmpp_singlestep-grid": {"points": "grid"},
    "dpmpp_2s_ancestral": {},
    "dpmpp_2s_ancestral-half": {"eta": 0.5},
    "dpmpp_sde": {},
    "dpmpp_sde-independent": {"noise": "independent", "eta": 0.5, "order": 3},
    "dpmpp_sde-order3": {"order": 3, "eta": 0.5},
    "dpmpp_sde-no-eta": {"order": 3, "eta": 0.0},
    "dpmpp_sde-grid": {"points": "grid", "order": 3},
}


def constant_network(schedule, prediction):
    """The network of the denoiser that always gives x_0; states are vectors over (x_0, epsilon, fresh noises)."""

    def network(x, t):
        alpha, sigma = (float(value) for value in schedule.at(t))
        if prediction == "edm":
            x = x * np.hypot(sigma, schedule.sigma_data)
        clean = np.zeros_like(x)
        clean[0] = 1.0
        c0, c1 = target(prediction, alpha, sigma)
        return c0 * clean + c1 * (x - alpha * clean) / sigma

    return network


@pytest.mark.parametrize("final", ["zero", "schedule"])
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_levels(case, name, final):
    schedule, prediction, spacing = SCHEDULES[name]
    for steps in (1, 2, 3, 4, 16):
        options = {"steps": steps, "prediction": prediction, "final_sigma": final, **spacing, **CASES[case]}
        table = samplers.build(case.split("-")[0], schedule=schedule, **options)
        basis = np.eye(2 + len(table))
        start = table.init_level[0] * basis[0] + table.init_level[1] * basis[1]
        states = trajectory(constant_network(schedule, prediction), table, start, partial(_take, basis))
        for state, (signal, noise) in zip(states, table.rows[:, KNOWN], strict=True):
            assert state[0] == pytest.approx(signal, rel=1e-9, abs=1e-9)
            assert np.linalg.norm(state[1:]) == pytest.approx(noise, rel=1e-8, abs=1e-9)
        assert (table.rows[-1, KNOWN][1] > 0.0) == (final == "schedule")


def _take(basis: np.ndarray, row: int) -> np.ndarray:
    return basis[2 + row]


@pytest.mark.parametrize(("name", "spacing"), [("no-signal", "trailing"), ("flow", "karras")])
def test_dpm_solver_sde_needs_signal(name, spacing):
    schedule, prediction, _ = SCHEDULES[name]
    options = {"schedule": schedule, "steps": 5, "prediction": prediction, "spacing": spacing}
    with pytest.raises(InputError, match="keeps no signal at its first timestep"):
        samplers.build("dpm_solver_sde", **options)
    highest = {"sigma_max": 0.99} if name == "flow" else {}
    table = samplers.build("dpm_solver_sde", **options | {"spacing": "karras"}, **highest)
    assert np.isfinite(table.rows[:, NEW_X]).all()
