"""The orders of convergence of UniPC, DEIS and SA-Solver, and the distribution that SA-Solver leaves."""

import pytest
from convergence import STEPS, assert_order, assert_slopes, distance
from stochastic import assert_distribution, assert_power

from benchmarks.convergence import levels
from fastdiff import samplers, schedules
from fastdiff.errors import InputError

VP, FLOW = schedules.linear(1000), schedules.flow(1000, shift=2.0)
NO_LOWER = {"lower_order_final": False}
CASES = {
    # A last step of first order leaves second order.
    "unipc": (VP, "v", 2, {}),
    "unipc-2": (VP, "v", 3, NO_LOWER),
    "unipc-2-bh1": (VP, "epsilon", 3, {"variant": "bh1", **NO_LOWER}),
    "unipc-2-noise": (VP, "sample", 3, {"predict": "noise", **NO_LOWER}),
    "unipc-2-predictor": (VP, "v", 2, {"corrector": False, **NO_LOWER}),
    "unipc-1": (FLOW, "flow", 2, {"order": 1, **NO_LOWER}),
    "deis": (VP, "v", 2, {}),
    "deis-1": (VP, "v", 1, {"order": 1}),
    "sa_solver": (VP, "v", 2, {"tau": 0.0}),
    "sa_solver-noise": (VP, "sample", 2, {"tau": 0.0, "predict": "noise", "spacing": "karras"}),
    "sa_solver-2-3": (VP, "v", 3, {"tau": 0.0, "corrector_order": 3, **NO_LOWER}),
    "sa_solver-1-1": (VP, "v", 1, {"tau": 0.0, "predictor_order": 1, "corrector_order": 1}),
}


@pytest.mark.parametrize("case", CASES)
def test_order_of_convergence(case):
    schedule, prediction, order, options = CASES[case]
    assert_order(order, case.split("-")[0], schedule, prediction, **{"spacing": "exponential", **options})
    if case in samplers.methods():
        assert samplers.methods()[case].order == order


HIGH_CASES = {
    "unipc-3": (VP, "v", 4, {"order": 3}),
    "unipc-3-noise": (VP, "v", 4, {"order": 3, "predict": "noise"}),
    "unipc-3-exact": (VP, "epsilon", 4, {"order": 3, "simplified": False}),
    "unipc-3-predictor-flow": (FLOW, "flow", 3, {"order": 3, "corrector": False}),
    "unipc-3-predictor": (VP, "v", 3, {"order": 3, "corrector": False}),
    "deis-3": (VP, "v", 3, {"order": 3}),
    "deis-3-flow": (FLOW, "flow", 3, {"order": 3}),
    "sa_solver-3-4": (VP, "v", 4, {"tau": 0.0, "predictor_order": 3, "corrector_order": 4}),
    "sa_solver-3-0": (VP, "v", 3, {"tau": 0.0, "predictor_order": 3, "corrector_order": 0}),
}


@pytest.mark.parametrize("case", HIGH_CASES)
def test_order_of_convergence_after_a_start_of_short_steps(case):
    schedule, prediction, order, options = HIGH_CASES[case]
    errors = []
    for steps in STEPS:
        given = {"sigmas": levels(schedule.kind, steps), "final_sigma": "last"}
        method = case.split("-")[0]
        table = samplers.build(method, schedule=schedule, prediction=prediction, **given, **NO_LOWER, **options)
        errors.append(distance(table, schedule))
    assert_slopes(order, errors)


NOISY = {
    "default": {},
    "half": {"tau": 0.5},
    "range": {"tau_timesteps": (200, 800)},
    "ratios": {"tau_ratios": (0.05, 1.0), "predictor_order": 3, "corrector_order": 3},
    "predictor": {"predictor_order": 1, "corrector_order": 0},
    "noise": {"predict": "noise"},
}


@pytest.mark.parametrize("case", NOISY)
def test_sa_solver_leaves_the_distribution_of_the_data(case):
    assert_distribution("sa_solver", **NOISY[case])


@pytest.mark.parametrize("case", ["default", "noise"])
def test_a_wrong_noise_of_sa_solver_is_seen(case):
    assert_power("sa_solver", **NOISY[case])


def test_noise_is_added_only_within_the_ranges():
    options = {"schedule": VP, "steps": 20, "prediction": "v", "spacing": "linspace", "endpoint": False}
    table = samplers.build("sa_solver", **options, tau_timesteps=[200, 800])
    assert [use.noise for use in table.uses] == [200 <= t <= 800 for t in table.timesteps]
    table = samplers.build("sa_solver", **options, tau_ratios=(0.05, 1.0))
    assert [use.noise for use in table.uses] == [
        *(0.05 <= r <= 1.0 for r in table.grid.noise_ratios[:-2]),
        False,
    ]


def test_noise_prediction_starts_without_signal_only_without_noise():
    options = {"schedule": FLOW, "steps": 5, "prediction": "flow", "predict": "noise"}
    with pytest.raises(InputError, match="keeps no signal at its first timestep"):
        samplers.build("sa_solver", **options)
    table = samplers.build("sa_solver", **options, tau_timesteps=(0, 999))
    assert [use.noise for use in table.uses] == [False, True, True, True, False]
