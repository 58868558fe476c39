"""Single-step DPM-Solver and DPM-Solver++: every state against the papers' integrals, orders, distributions."""

import math
from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from convergence import assert_order, error
from diffusers_peer import SCHEDULES, network, relative
from interpret import apply_row, trajectory
from lambda_integral import integral
from mixture import Mixture
from stochastic import assert_distribution, assert_power

from fastdiff import samplers, schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import INPUTS, NEW_ANCHOR, NEW_X

VP, FLOW = schedules.linear(1000), schedules.flow(1000, shift=2.0)
KINDS = {
    "vp": (schedules.cosine(1000), "v"),
    "flow": (FLOW, "flow"),
    "ve": (schedules.ve(1000, sigma_min=0.02, sigma_max=50.0), "sample"),
    "sub_vp": (schedules.sub_vp_sde(1000), "epsilon"),
}
CASES = {
    "dpm_solver_singlestep": {},
    "dpm_solver_singlestep-order1": {"order": 1},
    "dpm_solver_singlestep-heun": {"solver": "heun", "r1": 0.3},
    "dpm_solver_singlestep-order3": {"order": 3},
    "dpm_solver_singlestep-order3-heun": {"order": 3, "solver": "heun", "r1": 0.2, "r2": 0.7},
    "dpm_solver_singlestep-grid": {"order": 3, "points": "grid", "solver": "heun"},
    "dpm_solver_singlestep-lowered": {"order": 3, "lower_order_final": True},
    "dpmpp_singlestep": {},
    "dpmpp_singlestep-heun": {"solver": "heun"},
    "dpmpp_singlestep-order3": {"order": 3},
    "dpmpp_singlestep-order3-heun": {"order": 3, "solver": "heun"},
    "dpmpp_singlestep-grid": {"points": "grid"},
    "dpmpp_singlestep-grid3": {"order": 3, "points": "grid", "lower_order_final": True},
    "dpmpp_2s_ancestral": {},
    "dpmpp_2s_ancestral-half": {"eta": 0.5, "s_noise": 1.1},
    "dpmpp_sde": {},
    "dpmpp_sde-half": {"eta": 0.5, "s_noise": 1.1, "r": 0.4},
    "dpmpp_sde-independent": {"noise": "independent"},
    "dpmpp_sde-order3": {"order": 3, "solver": "heun"},
    "dpmpp_sde-order3-grid": {"order": 3, "points": "grid"},
}
NODES = {1: (), 2: (0.5,), 3: (1 / 3, 2 / 3)}
X = np.linspace(-2.0, 2.0, 7)


def blocks(grid, schedule, options) -> list[list[tuple[float, float]]]:
    """(alpha, sigma) of each block's points but the inner ones between grid points, and the nodes of those."""
    points, order = [*zip(grid.alphas, grid.sigmas, strict=True)], options.get("order", 2)
    inside = [alpha > 0.0 and sigma1 > 0.0 for (alpha, _), (_, sigma1) in pairwise(points)]
    if options.get("points") != "grid":
        lowered = options.get("lower_order_final", False)
        orders = [order if ok and not (lowered and i == grid.steps - 1) else 1 for i, ok in enumerate(inside)]
        nodes = {**NODES, order: tuple(options.get(n, m) for n, m in zip(("r1", "r2"), NODES[order], strict=False))}
        if "r" in options:
            nodes[2] = (options["r"],)
        return [(pair, nodes[n]) for pair, n in zip(pairwise(points), orders, strict=True)]
    first = [] if inside[0] else [1]
    count = grid.steps - len(first)
    # diffusers' order lists: 1, 2, 3, 1, 2, 3, ... cut so that the last is 1, with sigma' = 0 at the end.
    full, rest = divmod(count - 1, order)
    tail = {0: [1], 1: [1, 1], 2: [2, 1]}[rest] if count else []
    sizes, result, at = [*first, *[order] * full, *tail], [], 0
    for size in sizes:
        result.append((points[at : at + size + 1], ()))
        at += size
    return result


def split(r: float, r1: float, eta: float) -> tuple[float, float]:
    """(d, u) of k-diffusion's ancestral step, in more digits than a long step's difference of squares loses."""
    high, low = np.longdouble(r), np.longdouble(r1)
    up = eta * np.sqrt(low**2 * (1 - low**2 / high**2))
    return float(np.sqrt(low**2 - up**2)), float(up)


def states(method, schedule, grid, noises, options):
    """The states after each network call, written from the papers with the exact denoiser."""
    eta, s_noise = (
        (options.get("eta", 1.0) if method in ("dpmpp_2s_ancestral", "dpmpp_sde") else 0.0),
        options.get("s_noise", 1.0),
    )
    sde, outer = method == "dpmpp_sde", options.get("solver", "midpoint")
    drawn = iter(noises)
    x = X * max(grid.sigmas[0], 1.0)
    for points, nodes in blocks(grid, schedule, options):
        (alpha, sigma), (alpha1, sigma1) = points[0], points[-1]
        r = sigma / alpha if alpha else math.inf
        if len(points) == 2 and not nodes:
            data, z = Mixture().denoise(x, alpha, sigma), next(drawn)
            down, up = split(r, sigma1 / alpha1, eta)
            x = alpha1 * (data + down * (x - alpha * data) / sigma + up * s_noise * z)
            yield x
            continue
        end, _ = (sigma1 / alpha1, 0.0) if sde else split(r, sigma1 / alpha1, eta)
        inner = [schedule.from_ratio(r * (end / r) ** node) for node in nodes] or points[1:-1]
        levels = [(float(a), float(s)) for a, s in (points[0], *inner, points[-1])]
        known, start, path, variance = [], x, 0.0, 0.0
        for j, (alpha_j, sigma_j) in enumerate(levels[1:]):
            a, s = levels[j]
            data, z = Mixture().denoise(x, a, s), next(drawn)
            known.append(data if method.startswith("dpmpp") else (x - a * data) / s)
            last = j == len(levels) - 2
            down, up = split(r, sigma_j / alpha_j, eta if sde or last else 0.0)
            h = math.log(r / (sigma_j / alpha_j if sde else down))
            places = [math.log(r * b / c) for b, c in levels[1 : j + 1]]
            solver = outer if last or not nodes else "heun"
            if method.startswith("dpmpp"):
                rate = math.log(r / down) / h
                x = alpha_j * (down / sigma * start + rate * integral(-rate, h, known, places, solver))
            else:
                x = alpha_j / alpha * start - alpha_j * down * integral(1.0, h, known, places, solver)
            if sde and options.get("noise") != "independent":
                path = path + math.sqrt((up / down) ** 2 - variance) * z
                variance = (up / down) ** 2
                x = x + alpha_j * down * s_noise * path
            else:
                x = x + alpha_j * up * s_noise * z
            yield x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_states(case, kind):
    method, options, (schedule, prediction) = case.split("-")[0], CASES[case], KINDS[kind]
    noises = np.random.default_rng(3).standard_normal((40, len(X)))
    spacing = {} if kind == "flow" else {"spacing": "karras", "sigma_max": 50.0}
    for steps in (1, 2, 3, 4, 11):
        table = samplers.build(method, schedule=schedule, steps=steps, prediction=prediction, **spacing, **options)
        start = X * max(table.grid.sigmas[0], 1.0)
        found = trajectory(Mixture().denoiser(schedule, prediction), table, start, lambda i: noises[i])
        for ours, theirs in zip(found, states(method, schedule, table.grid, noises, options), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max())
