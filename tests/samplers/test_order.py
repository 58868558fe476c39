"""The order of convergence of each deterministic method, on a mixture whose flow is known exactly, in float64."""

import numpy as np
import pytest
from interpret import solve
from mixture import Mixture

from fastdiff import samplers, schedules

VP, FLOW = schedules.linear(1000), schedules.flow(1000, shift=2.0)
STEPS = (160, 320, 640)
CASES = {
    "ddim": (VP, "v", 1, {}),
    "ddim-flow": (FLOW, "sample", 1, {}),
    "euler": (VP, "epsilon", 1, {}),
    "heun": (VP, "v", 2, {}),
    "heun-sample": (VP, "sample", 2, {}),
    "dpmpp_2m": (VP, "epsilon", 2, {"lower_order_final": False}),
    "dpmpp_2m-heun": (VP, "v", 2, {"solver": "heun", "lower_order_final": False}),
    "dpmpp_2m-flow": (FLOW, "flow", 2, {"lower_order_final": False}),
    "dpmpp_2m_sde-eta0": (VP, "v", 2, {"eta": 0.0, "lower_order_final": False}),
    "flow_euler": (FLOW, "flow", 1, {}),
    "flow_euler-sample": (FLOW, "sample", 1, {}),
}


def error(method: str, schedule: schedules.Schedule, prediction: str, steps: int, spacing: str, **options) -> float:
    """Root mean square distance from the exact flow, over the quantiles, between two levels with noise left."""
    mixture, p = Mixture(), np.linspace(0.02, 0.98, 25)
    ends = {"sigma_min": 0.05, "sigma_max": 0.95 if schedule.kind == "flow" else 50.0}
    table = samplers.build(
        method,
        schedule=schedule,
        steps=steps,
        prediction=prediction,
        spacing=spacing,
        final_sigma="schedule",
        **ends,
        **options,
    )
    alphas, sigmas = table.grid.alphas, table.grid.sigmas
    scaled = table.first_input_scale != 1.0
    start = mixture.quantile(p, alphas[0], sigmas[0]) / (alphas[0] if scaled else 1.0)
    end = solve(mixture.denoiser(schedule, prediction), table, start) * (alphas[-1] if scaled else 1.0)
    return float(np.sqrt(np.mean((end - mixture.quantile(p, alphas[-1], sigmas[-1])) ** 2)))


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("case", CASES)
def test_order_of_convergence(case, spacing):
    """The slope between two step counts tends to the order like 1/steps: its own changes bound what is left."""
    schedule, prediction, order, options = CASES[case]
    method = case.split("-")[0]
    errors = np.array([error(method, schedule, prediction, steps, spacing, **options) for steps in STEPS])
    slopes = np.log2(errors[:-1] / errors[1:])
    assert slopes[-1] == pytest.approx(order, abs=0.06)
    assert abs(slopes[-1] - order) < abs(slopes[0] - order) + 1e-3
    assert samplers.methods()[method].order == order


def test_even_timesteps_keep_the_order():
    errors = [error_even(steps) for steps in STEPS]
    assert np.log2(errors[1] / errors[2]) == pytest.approx(2.0, abs=0.06)


def error_even(steps: int) -> float:
    """DPM++ 2M on even timesteps between the ends of the schedule."""
    mixture, p = Mixture(), np.linspace(0.02, 0.98, 25)
    options = {"spacing": "linspace", "integer": False, "final_sigma": "schedule", "lower_order_final": False}
    table = samplers.build("dpmpp_2m", schedule=VP, steps=steps, prediction="v", **options)
    start, end = ((table.grid.alphas[i], table.grid.sigmas[i]) for i in (0, -1))
    found = solve(mixture.denoiser(VP, "v"), table, mixture.quantile(p, *start))
    return float(np.sqrt(np.mean((found - mixture.quantile(p, *end)) ** 2)))


@pytest.mark.parametrize("method", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_the_last_step_reaches_the_data(method):
    """To sigma = 0 by default: 200 steps end within 0.02 of the exact quantiles of the data."""
    mixture, p = Mixture(), np.linspace(0.02, 0.98, 25)
    table = samplers.build(method, schedule=VP, steps=200, prediction="v")
    alpha, sigma = table.grid.alphas[0], table.grid.sigmas[0]
    start = mixture.quantile(p, alpha, sigma) / (alpha if table.first_input_scale != 1.0 else 1.0)
    end = solve(mixture.denoiser(VP, "v"), table, start)
    assert np.abs(end - mixture.quantile(p, 1.0, 0.0)).max() < 0.02
