"""Where options begin and cease to count: defaults, ends of ranges, the step count below which orders fall."""

import numpy as np
import pytest
from method_cases import fitting
from stochastic import draw, figures

from fastdiff import samplers, schedules

VP, VE = schedules.linear(1000), schedules.ve(1000)


@pytest.mark.parametrize("final", ["zero", "schedule"])
@pytest.mark.parametrize("method", samplers.methods())
def test_defaults_are_what_the_registry_says(method, final):
    """The functions' own defaults, which the registry repeats for people."""
    schedule, prediction = fitting(method)
    common = {"schedule": schedule, "steps": 20, "prediction": prediction, "final_sigma": final}
    silent, told = (
        samplers.build(method, **common),
        samplers.build(method, **common, **samplers.methods()[method].options),
    )
    assert np.array_equal(silent.rows, told.rows)
    assert np.array_equal(silent.timesteps, told.timesteps)
    assert silent.init_scale == told.init_scale


@pytest.mark.parametrize(("steps", "lowered"), [(14, True), (15, False)])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("deis", {}),
        ("dpm_solver", {}),
        ("dpm_solver_sde", {}),
        ("dpmpp_3m", {}),
        ("dpmpp_2m_sde", {}),
        ("dpmpp_3m_sde", {}),
        ("dpmpp_inverse", {}),
    ],
    ids=str,
)
def test_few_steps_lower_the_last_order(method, options, steps, lowered):
    given = {"schedule": VP, "prediction": "v", "final_sigma": "schedule", **options}
    assert (samplers.build(method, steps=steps, **given).uses[-1].history == 0) == lowered
    for chosen in (True, False):
        table = samplers.build(method, steps=steps, lower_order_final=chosen, **given)
        assert (table.uses[-1].history == 0) == chosen
    # Those that a start from an image leaves out count, and the order is the whole grid's.
    assert samplers.build(method, steps=2 * steps, strength=0.5, **given).uses[-1].history > 0


def test_the_ends_of_tau_belong_to_its_ranges():
    timesteps = {"schedule": VP, "prediction": "v", "timesteps": [900, 800, 500, 200, 100, 50]}
    table = samplers.build("sa_solver", **timesteps, tau_timesteps=(200, 800))
    assert [use.noise for use in table.uses] == [False, True, True, True, False, False]
    levels = {"schedule": VE, "prediction": "sample", "sigmas": [9.0, 4.0, 2.0, 1.0, 0.5, 0.25]}
    table = samplers.build("sa_solver", **levels, tau_ratios=(1.0, 4.0))
    assert [use.noise for use in table.uses] == [False, True, True, True, False, False]


def test_sa_solver_in_epsilon_wants_more_steps():
    """Fresh noise changes epsilon from step to step, and large steps multiply that."""
    few, more = (figures(draw("sa_solver", predict="noise", steps=steps))[2] for steps in (20, 50))
    assert few > 3.0
    assert more < 0.05


def raised_by(table: samplers.StepTable) -> np.ndarray:
    """By which factor each row's start lies above its grid point."""
    return table.levels[:, 1] / table.levels[:, 0] / table.grid.noise_ratios[:-1]


def test_churn_is_that_of_the_whole_grid():
    """s_churn is shared out among all its steps, those included that a start from an image leaves out."""
    options = {"schedule": VE, "steps": 20, "prediction": "sample", "s_churn": 4.0}
    table = samplers.build("dpmpp_2m", strength=0.5, **options)
    assert len(table) == 10
    assert raised_by(table) == pytest.approx(1.2, rel=1e-12)


def test_the_ends_of_churn_belong_to_it():
    levels = {"schedule": VE, "prediction": "sample", "sigmas": [9.0, 4.0, 2.0, 1.0, 0.5]}
    table = samplers.build("dpmpp_2m", s_churn=1.0, s_tmin=1.0, s_tmax=4.0, **levels)
    assert raised_by(table) == pytest.approx([1.0, 1.2, 1.2, 1.2, 1.0], rel=1e-12)
