"""Options of rows for a caller who keeps the slopes, or has the levels, himself; `build` does not offer them."""

import math
from itertools import pairwise

import numpy as np
import pytest

from fastdiff import schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import NEW_HISTORY, NEW_X
from fastdiff.samplers import grid
from fastdiff.samplers.dpm2 import dpm2, dpm2_ancestral
from fastdiff.samplers.euler import ancestral_step
from fastdiff.samplers.grid import Grid, GridOptions
from fastdiff.samplers.ipndm import ipndm
from fastdiff.samplers.lms import lms
from fastdiff.samplers.pndm import Call, plms, separate_calls
from fastdiff.samplers.problem import Problem
from fastdiff.samplers.terms import ADAMS_BASHFORTH

SCHEDULE = schedules.linear(1000)
GRID = grid.build(SCHEDULE, 6, GridOptions(spacing="karras"))
PROBLEM = Problem(SCHEDULE, GRID, "epsilon", None)
RATIOS = [point.ratio for point in PROBLEM.points(scaled=True)]


@pytest.mark.parametrize("rows", [lms, ipndm], ids=["lms", "ipndm"])
@pytest.mark.parametrize("order", [1, 4])
def test_all_slopes(rows, order):
    needed, every = rows(PROBLEM, order=order), rows(PROBLEM, order=order, slopes="all")
    assert [use.new_history for use in every.uses] == [True] * 6
    np.testing.assert_array_equal(every.rows[:, NEW_X], needed.rows[:, NEW_X])
    kept = np.array([use.new_history for use in needed.uses])
    assert kept.any() == (order > 1)
    np.testing.assert_array_equal(every.rows[kept], needed.rows[kept])


@pytest.mark.parametrize("earlier", [1, 2, 3])
def test_earlier_slopes_begin_in_the_middle(earlier):
    tail = Grid(GRID.timesteps[earlier:], GRID.alphas[earlier:], GRID.sigmas[earlier:])
    made = ipndm(Problem(SCHEDULE, tail, "epsilon", None), earlier=earlier)
    np.testing.assert_array_equal(made.rows, ipndm(PROBLEM).rows[earlier:])


@pytest.mark.parametrize("options", [{"earlier": 4}, {"earlier": -1}, {"slopes": "some"}], ids=str)
def test_what_they_refuse(options):
    with pytest.raises(InputError, match=next(iter(options))):
        ipndm(PROBLEM, **options)


def test_given_middles():
    exact = [math.sqrt(r * r1) for r, r1 in pairwise(RATIOS)]
    np.testing.assert_array_equal(dpm2(PROBLEM, middles=exact).rows, dpm2(PROBLEM).rows)
    moved = dpm2(PROBLEM, middles=[1.1 * middle for middle in exact])
    # A first row goes to q, as its y coefficient q / r says.
    ratios = [1.1 * q / r for q, r in zip(exact, RATIOS[:-1], strict=True)]
    np.testing.assert_allclose(moved.rows[:-1:2, NEW_X][:, 0], ratios[:-1])


def test_given_ancestral_levels():
    steps = [ancestral_step(r, r1, 1.0) for r, r1 in pairwise(RATIOS)]
    levels = [(math.sqrt(r * down), down, up) for r, (down, up) in zip(RATIOS[:-1], steps, strict=True)]
    plain = dpm2_ancestral(PROBLEM)
    np.testing.assert_array_equal(dpm2_ancestral(PROBLEM, levels=[*levels[:2], None, *levels[3:]]).rows, plain.rows)
    doubled = dpm2_ancestral(PROBLEM, levels=[(q, down, 2.0 * up) for q, down, up in levels])
    np.testing.assert_allclose(doubled.rows[:, NEW_X][:, -1], 2.0 * plain.rows[:, NEW_X][:, -1])


def test_separate_calls_of_a_run():
    points, whole = PROBLEM.points(), plms(PROBLEM, combined="output").rows
    calls = [Call(start, end, ADAMS_BASHFORTH[min(i, 3)]) for i, (start, end) in enumerate(pairwise(points))]
    made = separate_calls(PROBLEM, calls)
    # The first step of plms is two rows, the corrector among them.
    np.testing.assert_allclose(made.rows[1:, NEW_X], whole[2:, NEW_X], rtol=1e-12)
    assert not made.rows[:, NEW_HISTORY].any()
