"""The order of convergence of each deterministic method, on a mixture whose flow is known exactly, in float64."""

import numpy as np
import pytest
from convergence import STEPS, assert_order, distance
from interpret import solve
from mixture import Mixture

from fastdiff import samplers, schedules

VP, FLOW = schedules.linear(1000), schedules.flow(1000, shift=2.0)
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


@pytest.mark.parametrize("spacing", ["karras", "exponential"])
@pytest.mark.parametrize("case", CASES)
def test_order_of_convergence(case, spacing):
    schedule, prediction, order, options = CASES[case]
    method = case.split("-")[0]
    assert_order(order, method, schedule, prediction, spacing, **options)
    assert samplers.methods()[method].order == order


def test_even_timesteps_keep_the_order():
    """DPM++ 2M on even timesteps between the ends of the schedule."""
    options = {"spacing": "linspace", "integer": False, "final_sigma": "schedule", "lower_order_final": False}
    tables = [samplers.build("dpmpp_2m", schedule=VP, steps=steps, prediction="v", **options) for steps in STEPS]
    errors = [distance(table, VP) for table in tables]
    assert np.log2(errors[1] / errors[2]) == pytest.approx(2.0, abs=0.06)


@pytest.mark.parametrize("method", ["ddim", "euler", "heun", "dpmpp_2m"])
def test_the_last_step_reaches_the_data(method):
    """To sigma = 0 by default: 200 steps end within 0.02 of the exact quantiles of the data."""
    mixture, p = Mixture(), np.linspace(0.02, 0.98, 25)
    table = samplers.build(method, schedule=VP, steps=200, prediction="v")
    alpha, sigma = table.grid.alphas[0], table.grid.sigmas[0]
    start = mixture.quantile(p, alpha, sigma) * (table.init_level[1] / sigma)
    end = solve(mixture.denoiser(VP, "v"), table, start)
    assert np.abs(end - mixture.quantile(p, 1.0, 0.0)).max() < 0.02
