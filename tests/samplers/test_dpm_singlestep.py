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
from stochastic import assert_distribution, assert_power, draw

from fastdiff import samplers, schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import INPUTS, KNOWN, NEW_ANCHOR, NEW_X

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
    "dpm_solver_singlestep-clip": {"order": 3, "clip": 0.5},
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
    drawn, clip = iter(noises), options.get("clip", np.inf)
    x = X * max(grid.sigmas[0], 1.0)
    for points, nodes in blocks(grid, schedule, options):
        (alpha, sigma), (alpha1, sigma1) = points[0], points[-1]
        r = sigma / alpha if alpha else math.inf
        if len(points) == 2 and not nodes:
            data, z = np.clip(Mixture().denoise(x, alpha, sigma), -clip, clip), next(drawn)
            down, up = split(r, sigma1 / alpha1, eta)
            x = alpha1 * (data + down * (x - alpha * data) / sigma + up * s_noise * z)
            yield x
            continue
        end, _ = (sigma1 / alpha1, 0.0) if sde else split(r, sigma1 / alpha1, eta)
        inner = [schedule.from_ratio(r * (end / r) ** node) for node in nodes] or points[1:-1]
        levels = [(float(a), float(s)) for a, s in (points[0], *inner, points[-1])]
        known, start, path, fallen = [], x, 0.0, 0.0
        for j, (alpha_j, sigma_j) in enumerate(levels[1:]):
            a, s = levels[j]
            data, z = np.clip(Mixture().denoise(x, a, s), -clip, clip), next(drawn)
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
                path = path + math.sqrt(r - sigma_j / alpha_j - fallen) * z
                fallen = r - sigma_j / alpha_j
                x = x + alpha_j * up * s_noise * path / math.sqrt(fallen)
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


ORDERS = {
    "dpm_solver_singlestep": (VP, "epsilon", 2, {}),
    "dpm_solver_singlestep-heun-flow": (FLOW, "flow", 2, {"solver": "heun"}),
    "dpm_solver_singlestep-order3": (VP, "v", 3, {"order": 3}),
    "dpm_solver_singlestep-order3-heun-flow": (FLOW, "flow", 3, {"order": 3, "solver": "heun"}),
    "dpmpp_singlestep": (VP, "sample", 2, {}),
    "dpmpp_singlestep-order1": (VP, "v", 1, {"order": 1}),
    "dpmpp_singlestep-order3": (FLOW, "flow", 3, {"order": 3}),
    "dpmpp_singlestep-order3-heun": (VP, "epsilon", 3, {"order": 3, "solver": "heun", "r1": 0.5}),
    "dpmpp_singlestep-grid": (VP, "v", 2, {"points": "grid"}),
    "dpmpp_2s_ancestral": (VP, "v", 2, {"eta": 0.0}),
    "dpmpp_sde": (VP, "epsilon", 2, {"eta": 0.0}),
    "dpmpp_sde-order3": (VP, "v", 3, {"eta": 0.0, "order": 3, "solver": "heun"}),
}


@pytest.mark.parametrize("case", ORDERS)
def test_order_of_convergence(case):
    schedule, prediction, order, options = ORDERS[case]
    assert_order(order, case.split("-")[0], schedule, prediction, step_counts=(80, 160, 320), **options)
    assert "order" in options or samplers.methods()[case.split("-")[0]].order == order


def test_third_order_needs_its_second_inner_point():
    """Away from r2 = 2/3 the state at r1, which is of order 1, counts in the result."""
    errors = [error("dpmpp_singlestep", VP, "v", steps, order=3, r2=0.8) for steps in (80, 160, 320)]
    assert np.log2(errors[1] / errors[2]) == pytest.approx(2.0, abs=0.06)


DISTRIBUTIONS = {
    "dpmpp_2s_ancestral": {},
    "dpmpp_2s_ancestral-half": {"eta": 0.5},
    "dpmpp_sde": {},
    "dpmpp_sde-independent": {"noise": "independent"},
    "dpmpp_sde-order3": {"order": 3, "solver": "heun", "eta": 0.7},
    "dpm_solver_singlestep-eta": {"eta": 1.0, "order": 3},
    "dpmpp_singlestep-eta": {"eta": 0.5},
}


@pytest.mark.parametrize("case", DISTRIBUTIONS)
def test_distribution(case):
    assert_distribution(case.split("-")[0], **DISTRIBUTIONS[case])


@pytest.mark.parametrize("case", ["dpmpp_2s_ancestral", "dpmpp_sde"])
def test_a_wrong_noise_coefficient_is_seen(case):
    assert_power(case, **DISTRIBUTIONS[case])


@pytest.mark.parametrize("r", [0.3, 0.5])
def test_the_two_noises_of_a_step_are_one_path(r):
    """z_2 = sqrt(c) z_1 + sqrt(1 - c) z', c = (rho - rho_s) / (rho - rho') with rho = sigma / alpha."""
    table = samplers.build("dpmpp_sde", schedule=VP, steps=6, prediction="v", spacing="karras", r=r)
    noise = INPUTS.index("noise")
    for i, (high, low) in enumerate(pairwise(table.grid.noise_ratios[:-1])):
        c = (high - high * (low / high) ** r) / (high - low)
        up = table.grid.alphas[i + 1] * low * math.sqrt(1.0 - (low / high) ** 2)
        first, second = table.rows[2 * i], table.rows[2 * i + 1]
        assert first[NEW_ANCHOR][noise] == pytest.approx(up * math.sqrt(c), rel=1e-9)
        assert second[NEW_X][noise] == pytest.approx(up * math.sqrt(1.0 - c), rel=1e-9)
        assert second[NEW_X][INPUTS.index("anchor")] == 1.0


def test_one_path_is_worth_its_correlation():
    """With independent noises the inner state lies off the path, and few steps lose more of the variance."""
    exact = Mixture().moments()[1]
    found = {noise: draw("dpmpp_sde", steps=20, noise=noise).var() for noise in ("brownian", "independent")}
    assert abs(found["brownian"] / exact - 1.0) < 0.5 * abs(found["independent"] / exact - 1.0)


@pytest.mark.parametrize("evaluations", [1, 2, 3, 6, 7, 8, 20])
def test_fast_orders(evaluations):
    """Lu et al. 2022, section 3.4: as many third-order steps as fit, the rest by lower ones."""
    steps = evaluations // 3 + 1
    options = {"order": 3, "evaluations": evaluations, "spacing": "logsnr"}
    table = samplers.build("dpm_solver_singlestep", schedule=VP, steps=steps, prediction="epsilon", **options)
    starts = np.flatnonzero(np.isin(np.round(table.timesteps, 9), np.round(table.grid.timesteps[:-1], 9)))
    found = np.diff([*starts, len(table)]).tolist()
    expected = {0: [3] * (steps - 2) + [2, 1], 1: [3] * (steps - 1) + [1], 2: [3] * (steps - 1) + [2]}[evaluations % 3]
    assert len(table) == evaluations
    assert found == expected


@pytest.mark.parametrize("steps", [2, 7, 20])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@pytest.mark.parametrize("karras", [False, True], ids=["linspace", "karras"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_diffusers_sde(schedule, karras, prediction, steps):
    """DPMSolverSDEScheduler, whose state is y = x / alpha: every state and network input, with the same noise."""
    names = {"epsilon": "epsilon", "v": "v_prediction"}
    config = {"prediction_type": names[prediction], "use_karras_sigmas": karras, **SCHEDULES[schedule]}
    scheduler = diffusers.DPMSolverSDEScheduler(1000, **config)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(5)
    noises = [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(2 * steps)]
    drawn = iter(noises)
    scheduler.noise_sampler = lambda *_: next(drawn)
    own = schedules.custom(scheduler.alphas_cumprod.double().numpy())
    options = samplers.methods()["dpmpp_sde"].diffusers
    if karras:
        options = {"spacing": "karras", "sigma_max": float(own.noise_ratios[-1]), "noise": "independent"}
    table = samplers.build("dpmpp_sde", schedule=own, steps=steps, prediction=prediction, **options)
    np.testing.assert_allclose(table.timesteps, scheduler.timesteps, rtol=1e-5, atol=1e-3)
    y = torch.randn(2, 3, 8, 8, generator=generator) * scheduler.init_noise_sigma
    anchor, remaining = None, iter(noises)
    for i, t in enumerate(scheduler.timesteps):
        x = y.double().numpy() * table.levels[i, 0]
        given = scheduler.scale_model_input(y, t)
        assert relative(torch.from_numpy(x), given) < 1e-5
        m = network(own, prediction, given, float(t))
        noise = next(remaining).double().numpy() if table.uses[i].noise else None
        ours, _, new_anchor = apply_row(table.rows[i], x, m.double().numpy(), anchor, [], noise)
        anchor = anchor if new_anchor is None else new_anchor
        y = scheduler.step(m, t, y).prev_sample
        assert relative(torch.from_numpy(ours / table.rows[i, KNOWN][0]), y) < 1e-5


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("dpm_solver_singlestep", {"order": 4}, "order: expected a whole number from 1 to 3, got 4"),
        ("dpm_solver_singlestep", {"points": "inner"}, "points: expected one of between, grid"),
        ("dpm_solver_singlestep", {"r1": 1.0}, "r1, r2: expected rising numbers between 0 and 1, got 1.0 and None"),
        ("dpmpp_singlestep", {"order": 3, "r1": 0.7}, "r1, r2: expected rising numbers between 0 and 1, got 0.7"),
        ("dpmpp_singlestep", {"r2": 0.7}, "r1, r2: order 2 with points='between' has no use for them"),
        ("dpmpp_singlestep", {"r1": 0.4, "points": "grid"}, "r1, r2: order 2 with points='grid' has no use for them"),
        ("dpmpp_singlestep", {"evaluations": 8, "order": 3}, "evaluations: 8 calls need order=3, .* and steps=3, got"),
        ("dpmpp_singlestep", {"evaluations": 28}, "evaluations: 28 calls need order=3, .* got order=2"),
        ("dpmpp_singlestep", {"evaluations": 0}, "evaluations: expected a whole number from 1 to 30, got 0"),
        ("dpmpp_sde", {"noise": "path"}, "noise: expected one of brownian, independent"),
        ("dpmpp_sde", {"r": 0.4, "points": "grid"}, "dpmpp_sde: r: order 2 with points='grid' has no use for"),
        ("dpmpp_sde", {"curvature": "half"}, "curvature: expected one of exact, offset"),
        ("dpmpp_2s_ancestral", {"eta": 1.5}, "eta: expected a number from 0 to 1, got 1.5"),
    ],
    ids=str,
)
def test_bad_options_are_refused(method, options, message):
    with pytest.raises(InputError, match=message):
        samplers.build(method, **{"schedule": VP, "steps": 10, "prediction": "v", **options})
