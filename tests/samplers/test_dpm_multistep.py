"""Multistep DPM-Solver and DPM-Solver++: every state against the papers' integrals, orders, distributions, churn."""

import math

import numpy as np
import pytest
from convergence import assert_order, distance
from interpret import trajectory
from mixture import Mixture
from stochastic import assert_distribution, assert_power

from fastdiff import samplers, schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import INPUTS, NEW_X

VP, FLOW = schedules.linear(1000), schedules.flow(1000, shift=2.0)
KINDS = {
    "vp": (schedules.cosine(1000), "epsilon"),
    "flow": (FLOW, "flow"),
    "ve": (schedules.ve(1000, sigma_min=0.02, sigma_max=50.0), "sample"),
    "sub_vp": (schedules.sub_vp_sde(1000), "epsilon"),
}
CASES = {
    "dpmpp_2m": {},
    "dpmpp_2m-heun": {"solver": "heun"},
    "dpmpp_2m-order1": {"order": 1},
    "dpmpp_2m_sde": {},
    "dpmpp_2m_sde-heun": {"solver": "heun", "eta": 0.6, "s_noise": 1.1},
    "dpmpp_2m_sde-order1": {"order": 1},
    "dpmpp_3m": {},
    "dpmpp_3m-half": {"curvature": "half", "solver": "heun"},
    "dpmpp_3m_sde": {},
    "dpmpp_3m_sde-half": {"curvature": "half", "solver": "midpoint", "eta": 0.4},
    "dpm_solver": {},
    "dpm_solver-heun": {"solver": "heun"},
    "dpm_solver-order1": {"order": 1},
    "dpm_solver-order3": {"order": 3},
    "dpm_solver-half": {"order": 3, "curvature": "half"},
    "dpm_solver_sde": {},
    "dpm_solver_sde-heun": {"solver": "heun", "eta": 0.6, "s_noise": 1.1},
    "dpm_solver_sde-order1": {"order": 1},
}
NODES, WEIGHTS = np.polynomial.legendre.leggauss(60)
X = np.linspace(-2.0, 2.0, 7)


def integral(rate: float, h: float, past: list, places: list[float], solver: str, half: bool):
    """int_0^h e^(rate (h - u)) P(u) du by quadrature; P through `past` (the newest first) at 0 and `places` < 0.

    With one earlier value and "midpoint", P is what it is at h/2. Half the curvature: P'' is halved.
    """
    u = 0.5 * h * (NODES + 1.0)
    kernel = 0.5 * h * WEIGHTS * np.exp(rate * (h - u))
    value = past[0]
    if len(past) == 1:
        return kernel.sum() * value
    if len(past) == 2:
        slope = (past[1] - value) / places[0]
        return kernel.sum() * value + (kernel.sum() * h / 2 if solver == "midpoint" else (kernel * u).sum()) * slope
    a, b = places
    # value + p u + q u^2 through the other two.
    q = ((past[2] - value) / b - (past[1] - value) / a) / (b - a)
    p = (past[1] - value) / a - q * a
    return kernel.sum() * value + (kernel * u).sum() * p + (kernel * u**2).sum() * q * (0.5 if half else 1.0)


def states(method: str, grid, noises, *, order=None, eta=None, s_noise=1.0, solver=None, curvature="exact"):
    """The states of the method after each step, written from the papers' integrals with the exact denoiser."""
    order = order or (3 if "3m" in method else 2)
    solver = solver or ("heun" if method == "dpmpp_3m_sde" else "midpoint")
    eta = (1.0 if eta is None else eta) if method.endswith("sde") else 0.0
    x, steps = X * (grid.sigmas[0] if grid.sigmas[0] > 1.0 else 1.0), grid.steps
    with np.errstate(divide="ignore"):
        lam = np.log(grid.alphas / grid.sigmas)
    past, places = [], []
    for i in range(steps):
        (alpha, alpha1), (sigma, sigma1) = grid.alphas[i : i + 2], grid.sigmas[i : i + 2]
        data = Mixture().denoise(x, alpha, sigma)
        epsilon = (x - alpha * data) / sigma
        past, places = [data if "pp" in method else epsilon, *past][:3], [lam[i], *places][:3]
        possible = min(order, sum(np.isfinite(places)), steps - i if steps < 15 else order)
        earlier = [place - lam[i] for place in places[1:possible]]
        if sigma1 == 0.0:
            x = data
        elif alpha == 0.0:
            # From no signal: x is epsilon alone, to which an SDE adds its noise.
            kept = 0.0 if eta else 1.0
            x = alpha1 * data + sigma1 * (kept * epsilon + (1.0 - kept) * s_noise * noises[i])
        else:
            h = lam[i + 1] - lam[i]
            about = past[: len(earlier) + 1], earlier, solver, curvature == "half"
            if "pp" in method:
                drift = alpha1 * (1.0 + eta) * integral(-(1.0 + eta), h, *about)
                kept, std = sigma1 / sigma * math.exp(-eta * h), sigma1 * math.sqrt(1.0 - math.exp(-2.0 * eta * h))
            else:
                drift = -(1.0 + eta) * sigma1 * integral(1.0, h, *about)
                kept, std = alpha1 / alpha, sigma1 * math.sqrt(eta * (math.exp(2.0 * h) - 1.0))
            x = kept * x + drift + std * s_noise * noises[i]
        yield x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_states(case, kind):
    method, (schedule, prediction) = case.split("-")[0], KINDS[kind]
    noises = np.random.default_rng(3).standard_normal((20, len(X)))
    spacing = {} if kind == "flow" else {"spacing": "karras", "sigma_max": 50.0}
    if case.startswith("dpm_solver_sde") and kind == "flow":
        spacing = {"spacing": "karras", "sigma_max": 0.95}
    for steps in (1, 2, 3, 4, 16):
        table = samplers.build(method, schedule=schedule, steps=steps, prediction=prediction, **spacing, **CASES[case])
        expected = states(method, table.grid, noises, **CASES[case])
        start = X * (table.grid.sigmas[0] if table.grid.sigmas[0] > 1.0 else 1.0)
        found = trajectory(Mixture().denoiser(schedule, prediction), table, start, lambda i: noises[i])
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9 * np.abs(theirs).max())
