"""The loop with rows of a caller's own, whose anchor comes with the model's call."""

from itertools import pairwise

import pytest
import torch
from k_diffusion_drop_in import denoiser, distance, karras, start

from fastdiff.integrations.k_diffusion import plans
from fastdiff.integrations.k_diffusion.loop import Plan, Rows, read_levels, run
from fastdiff.samplers.table import make_row, make_table


def plan_of(levels):
    """x' = D + s'/s (x - U), U another prediction for the same state: Euler with guidance in the data part alone."""
    problem = plans.problem_of(levels)
    rows = [
        make_row(problem, at, {"D": 1.0, "x": end.ratio / at.ratio, "anchor": -end.ratio / at.ratio}, to=end)
        for at, end in pairwise(problem.points())
    ]
    return Plan(make_table("guided", problem, rows), (1,) * len(rows), (False,) * len(rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_a_given_anchor(dtype):
    sigmas, others = karras(6).double(), []

    def model(x, sigma):
        others.append((0.5 * denoiser(x, sigma)).transpose(2, 3).contiguous().transpose(2, 3))
        return denoiser(x, sigma)

    plan = plan_of(read_levels(sigmas))
    found = run(model, start(20.0, dtype), sigmas, plan, range(6), given=lambda row: others[row])
    x = start(20.0, dtype).double()
    for s, end in pairwise(sigmas):
        denoised = denoiser(x, s.expand(2))
        x = denoised + end / s * (x - 0.5 * denoised)
    assert found.dtype == dtype
    assert distance(found, x) < {torch.float32: 1e-6, torch.float16: 2e-3, torch.float64: 1e-14}[dtype]


def test_plans_are_kept():
    levels = read_levels(karras(6))
    assert plans.dpmpp_2m(levels, torch.float32) is plans.dpmpp_2m(read_levels(karras(6)), torch.float32)
    assert plans.dpmpp_2m(levels, torch.float32) is not plans.dpmpp_2m(levels, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_history_that_no_row_reads_is_forgotten(dtype):
    levels, x, held = read_levels(karras(6)), start(20.0, dtype), []
    table = plans.dpmpp_2m(levels, dtype).table
    rows = Rows(table, x.device)
    for row, level in enumerate(levels[:-1]):
        x = rows.apply(row, x, denoiser(x, torch.full((len(x),), level)))
        held.append(len(rows._carried.history))
    assert max(held) == table.depth == 1
