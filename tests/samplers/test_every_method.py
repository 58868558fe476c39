"""What holds for every method of the registry, on every kind of schedule, for any number of steps."""

from itertools import pairwise

import numpy as np
import pytest
from interpret import trajectory

from fastdiff import parameterization, samplers, schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import CLIP, INPUTS, KNOWN, NEW_ANCHOR, NEW_HISTORY, NEW_X
from fastdiff.samplers import StepTable
from fastdiff.schedules import Schedule

LENGTH = 64
STEPS = [1, 2, 3, 4, 5, 6, 17, 50, LENGTH - 1, LENGTH]
VP = schedules.linear(LENGTH, beta_start=1e-3, beta_end=0.3)
CASES = {
    "vp": (VP, "v"),
    "zero_terminal_snr": (schedules.zero_terminal_snr(VP), "v"),
    "flow": (schedules.flow(LENGTH, shift=2.0), "flow"),
    "ve": (schedules.ve(LENGTH, sigma_min=0.01, sigma_max=60.0), "sample"),
    "sub_vp": (schedules.sub_vp_sde(LENGTH), "epsilon"),
}
CASES |= {f"{name}-below": CASES[name] for name in ("zero_terminal_snr", "flow")}
# What the schedules without signal at their end need for the methods that divide by alpha.
BELOW = {"zero_terminal_snr-below": 40.0, "flow-below": 0.97}
# LCM's scalings keep a share of the noise by design.
OPTIONS = {"lcm": {"timestep_scaling": None}}
# Methods that return to noisier levels on their way.
RETURNING = {"restart", "repaint", "heunpp2"}
# Methods that go from the data to the noise.
INVERSE = {name for name, info in samplers.methods().items() if info.inverse}
PAIRS = [
    (method, case)
    for method, info in samplers.methods().items()
    if method not in INVERSE
    for case, (schedule, _) in CASES.items()
    if not info.kinds or schedule.kind in info.kinds
]


def refused(method: str, case: str, steps: int) -> str | None:
    """Why this may be refused; None: it has to work."""
    schedule, _ = CASES[case]
    if case in BELOW:
        return None
    if samplers.methods()[method].grid.get("spacing") == "lcm" and steps > 50:
        return "picks them from 50 timesteps"
    return None if schedule.alphas[-1] > 0.0 else "keeps no signal at its first timestep"


def build(method: str, case: str, steps: int) -> StepTable | None:
    schedule, prediction = CASES[case]
    options = dict(OPTIONS.get(method, {}))
    if case in BELOW:
        options |= {"spacing": "karras", "sigma_max": BELOW[case]}
    try:
        return samplers.build(method, schedule=schedule, steps=steps, prediction=prediction, **options)
    except InputError as error:
        message = str(error)
    reason = refused(method, case, steps)
    assert reason is not None, message
    assert reason in message
    return None


def tables(method: str, case: str) -> list[StepTable]:
    found = [build(method, case, steps) for steps in STEPS]
    return [table for table in found if table is not None]


def ratio(signal: float, noise: float) -> float:
    return float(noise / signal) if signal else np.inf


def level_of(schedule: Schedule, timestep: float) -> float:
    return ratio(*schedule.at(timestep))


@pytest.mark.parametrize(("method", "case"), PAIRS)
def test_rows_are_finite_and_end_at_the_data(method, case):
    for table in tables(method, case):
        assert np.isfinite(np.delete(table.rows, CLIP, axis=1)).all()
        assert tuple(table.rows[-1, KNOWN]) == (1.0, 0.0)
        noise = INPUTS.index("noise")
        last = table.rows[-1]
        assert (last[NEW_X][noise], last[NEW_HISTORY].any(), last[NEW_ANCHOR].any()) == (0.0, False, False)


@pytest.mark.parametrize(("method", "case"), PAIRS)
def test_each_row_starts_at_the_level_where_the_last_one_ended(method, case):
    schedule, _ = CASES[case]
    for table in tables(method, case):
        starts = [ratio(*level) for level in table.levels]
        assert starts == pytest.approx([level_of(schedule, t) for t in table.timesteps], rel=1e-6)
        if method not in RETURNING:
            assert all(after <= before * (1.0 + 1e-9) for before, after in pairwise(starts))


@pytest.mark.parametrize(("method", "case"), PAIRS)
def test_what_a_row_reads_was_written(method, case):
    for table in tables(method, case):
        history, anchor = 0, False
        for use in table.uses:
            assert use.history <= history
            assert anchor or not use.anchor
            history += use.new_history
            anchor = anchor or use.new_anchor


@pytest.mark.parametrize(("method", "case"), PAIRS)
def test_a_network_that_knows_the_data_gives_it_back(method, case):
    """With D = x_0 in every row the result is x_0, whatever the noise."""
    schedule, prediction = CASES[case]
    x0 = np.linspace(-1.0, 1.0, 5)

    def network(given, t):
        alpha, sigma = (float(value) for value in schedule.at(t))
        c0, c1 = parameterization.target(prediction, alpha, sigma)
        return c0 * x0 + c1 * (given - alpha * x0) / sigma

    for table in tables(method, case):
        generator = np.random.default_rng(len(table))
        signal, noise = table.init_level
        start = signal * x0 + noise * generator.standard_normal(5)
        *_, end = trajectory(network, table, start, lambda _, source=generator: source.standard_normal(5))
        # Rounding of terms as large as the first level's noise is left over, and what the method makes of one rounding
        # of each output of the network: much, in a Runge-Kutta step of pndm from sigma / alpha = 80 to 1e-4.
        rounding = np.random.default_rng(1)
        again = np.random.default_rng(len(table))
        again.standard_normal(5)

        def rounded(given, t, source=rounding, exact=network):
            return exact(given, t) * (1.0 + np.finfo(float).eps * source.choice([-1.0, 1.0], 5))

        *_, moved = trajectory(rounded, table, start, lambda _, source=again: source.standard_normal(5))
        np.testing.assert_allclose(end, x0, rtol=0, atol=1e-8 + 10.0 * np.abs(moved - end).max())


def test_every_method_is_proved_on_some_schedule():
    assert {method for method, _ in PAIRS} == set(samplers.methods()) - INVERSE
    for method in samplers.methods().keys() - INVERSE:
        assert any(tables(method, case) for name, case in PAIRS if name == method)
