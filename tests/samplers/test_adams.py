"""UniPC, DEIS and SA-Solver: tables against loops written from the papers, and how they begin and end."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from convergence import QUANTILES, start_of
from interpret import solve, trajectory
from mixture import Mixture

from fastdiff import samplers, schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import CLIP, INPUTS, NEW_X
from fastdiff.samplers import Grid, StepTable
from fastdiff.samplers.adams import Interval
from fastdiff.samplers.problem import Problem

VP, FLOW = schedules.linear(1000), schedules.flow(1000, shift=2.0)
KINDS = {
    "vp": VP,
    "zero_snr": schedules.zero_terminal_snr(VP),
    "flow": FLOW,
    "ve": schedules.ve(1000),
    "sub_vp": schedules.sub_vp_sde(1000),
}
ORDERS = [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2), (2, 3), (3, 4), (4, 2), (4, 4)]
Move = Callable[[int, np.ndarray, list[int], np.ndarray], np.ndarray]


def outputs_of(table: StepTable) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A start, network outputs and noises; every coefficient of the table acts on them."""
    generator = np.random.default_rng(4)
    return generator.standard_normal(5), *generator.standard_normal((2, len(table) + 1, 5))


def assert_states(table: StepTable, expected: list[np.ndarray]) -> None:
    """The table gives these states after its rows, relative error 1e-9."""
    x, outputs, noises = outputs_of(table)
    remaining = iter(outputs)
    found = list(trajectory(lambda *_: next(remaining), table, x, lambda i: noises[i]))
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert np.linalg.norm(ours - theirs) < 1e-9 * np.linalg.norm(theirs), f"row {index}"


def quadrature(grid: Grid, outputs: np.ndarray, *, data: bool, tau: float = 0.0, line: bool = False) -> Move:
    """The exact solution over step i with f the polynomial through the outputs at the nodes: the integral by Gauss and
    Legendre. With `line`, int e^(-k (lambda' - l)) (l - lambda) dl is h^2/2 where there are two nodes."""
    alphas, sigmas, k = grid.alphas, grid.sigmas, 1.0 + tau**2
    lam = np.log(alphas / sigmas)
    places, weights = np.polynomial.legendre.leggauss(40)

    def move(i: int, x: np.ndarray, nodes: list[int], z: np.ndarray) -> np.ndarray:
        h = lam[i + 1] - lam[i]
        at = lam[i] + h * (places + 1.0) / 2.0
        weight = weights * h / 2.0 * np.exp(-k * (lam[i + 1] - at) if data else lam[i + 1] - at)
        integral = np.zeros_like(x)
        for j in nodes:
            others = [other for other in nodes if other != j]
            basis = np.prod([(at - lam[o]) / (lam[j] - lam[o]) for o in others], axis=0) * np.ones_like(at)
            integral += (weight * basis).sum() * outputs[j]
        if line and len(nodes) == 2:
            slope = (outputs[nodes[0]] - outputs[nodes[1]]) / (lam[nodes[0]] - lam[nodes[1]])
            integral += slope * (h**2 / 2.0 - (weight * (at - lam[i])).sum())
        if data:
            kept = sigmas[i + 1] / sigmas[i] * math.exp(-(tau**2) * h)
            noise = sigmas[i + 1] * math.sqrt(1.0 - math.exp(-2.0 * tau**2 * h))
            return kept * x + k * alphas[i + 1] * integral + noise * z
        noise = tau * sigmas[i + 1] * math.sqrt(math.expm1(2.0 * h))
        return alphas[i + 1] / alphas[i] * x - k * sigmas[i + 1] * integral + noise * z

    return move


def predict_and_correct(table: StepTable, move: Move, predictor: int, corrector: int) -> list[np.ndarray]:
    """The predicted states. The orders grow from 1; `corrector` counts the new output too, and 0 corrects nothing."""
    x, _, noises = outputs_of(table)
    states = []
    for i in range(len(table)):
        states.append(move(i, x, list(range(i, max(i - predictor, -1), -1)), noises[i]))
        after = list(range(i + 1, max(i + 1 - corrector, -1), -1))
        x = move(i, x, after, noises[i]) if corrector else states[-1]
    return states


def build(method: str, schedule=VP, *, data: bool, steps: int = 9, **options: Any) -> StepTable:
    """A table whose network gives what the method interpolates, and whose last step leaves noise."""
    options = {"final_sigma": "schedule", "lower_order_final": False, **options}
    return samplers.build(method, schedule=schedule, steps=steps, prediction="sample" if data else "epsilon", **options)


@pytest.mark.parametrize("kind", ["vp", "ve", "sub_vp"])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_deis(order, kind):
    table = build("deis", KINDS[kind], data=False, order=order)
    move = quadrature(table.grid, outputs_of(table)[1], data=False)
    assert_states(table, predict_and_correct(table, move, order, 0))


@pytest.mark.parametrize("data", [True, False], ids=["data", "noise"])
@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
@pytest.mark.parametrize(("predictor", "corrector"), ORDERS)
def test_sa_solver(predictor, corrector, tau, data):
    options = {"predictor_order": predictor, "corrector_order": corrector, "tau": tau}
    for simplified in (True, False):
        predict = "data" if data else "noise"
        table = build("sa_solver", data=data, predict=predict, simplified=simplified, **options)
        move = quadrature(table.grid, outputs_of(table)[1], data=data, tau=tau, line=simplified and data)
        assert_states(table, predict_and_correct(table, move, predictor, corrector))


@pytest.mark.parametrize("data", [True, False], ids=["data", "noise"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_with_exact_integrals(order, data):
    tables = [
        build("unipc", data=data, predict="data" if data else "noise", simplified=False, order=order, variant=variant)
        for variant in ("bh1", "bh2")
    ]
    assert np.array_equal(tables[0].rows, tables[1].rows)
    move = quadrature(tables[0].grid, outputs_of(tables[0])[1], data=data)
    assert_states(tables[0], predict_and_correct(tables[0], move, order, order + 1))


def solved(grid: Grid, outputs: np.ndarray, variant: str, *, data: bool) -> Move:
    """Zhao et al. 2023: the integral of f_i, and sum_m a_m B(h) (f_m - f_i) / r_m with r_m = (lambda_m - lambda) / h.

    a solves sum_m a_m B r_m^(n-1) = int e^(-(lambda' - l)) u^n dl, u = (l - lambda) / h, and is 1/2 where there is one.
    """
    lam = np.log(grid.alphas / grid.sigmas)
    places, weights = np.polynomial.legendre.leggauss(40)
    u = (places + 1.0) / 2.0

    def move(i: int, x: np.ndarray, nodes: list[int], _: np.ndarray) -> np.ndarray:
        h = lam[i + 1] - lam[i]
        kernel = h * weights / 2.0 * np.exp(h * (u - 1.0) if data else h * (1.0 - u))
        others = [j for j in nodes if j != i]
        r = np.array([(lam[j] - lam[i]) / h for j in others])
        b = h if variant == "bh1" else kernel.sum()
        n = np.arange(1, len(r) + 1)[:, None]
        a = np.linalg.solve(r ** (n - 1), (kernel * u**n).sum(axis=1)) / b if len(r) != 1 else np.array([0.5])
        differences = [(outputs[j] - outputs[i]) / r[m] for m, j in enumerate(others)]
        integral = kernel.sum() * outputs[i] + b * sum(a[m] * each for m, each in enumerate(differences))
        if data:
            return grid.sigmas[i + 1] / grid.sigmas[i] * x + grid.alphas[i + 1] * integral
        return grid.alphas[i + 1] / grid.alphas[i] * x - grid.sigmas[i + 1] * integral

    return move


@pytest.mark.parametrize("data", [True, False], ids=["data", "noise"])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, variant, data):
    predict = "data" if data else "noise"
    for corrector in (True, False):
        table = build("unipc", data=data, predict=predict, order=order, variant=variant, corrector=corrector)
        move = solved(table.grid, outputs_of(table)[1], variant, data=data)
        assert_states(table, predict_and_correct(table, move, order, order + 1 if corrector else 0))


def test_unipc_leaves_steps_uncorrected():
    """An uncorrected state is the predicted one: its row reads x, no anchor, and the row before writes none."""
    uses = build("unipc", data=True, corrector=[0, 3]).uses
    assert [use.anchor for use in uses] == [False, False, True, True, False, True, True, True, True]
    assert [use.new_anchor for use in uses] == [False, True, True, False, True, True, True, True, False]


@pytest.mark.parametrize(
    ("method", "options", "written"),
    [
        # Predictor and corrector read f and one older f; the last two steps are of orders 2 and 1.
        ("unipc", {"order": 2}, [True, True, True, False, False]),
        ("unipc", {"order": 3}, [True, True, True, False, False]),
        ("unipc", {"order": 3, "lower_order_final": False}, [True, True, True, False, False]),
        (
            "unipc",
            {"order": 3, "lower_order_final": False, "final_sigma": "schedule"},
            [True, True, True, True, False],
        ),
        ("unipc", {"order": 1}, [False] * 5),
        ("sa_solver", {"predictor_order": 1, "corrector_order": 2}, [False] * 5),
        # The last corrector takes place at the last row, with what the anchor holds.
        ("sa_solver", {"predictor_order": 1, "corrector_order": 3}, [True, True, True, False, False]),
        ("deis", {"order": 4}, [True, True, True, False, False]),
    ],
    ids=str,
)
def test_history_is_written_where_it_is_read(method, options, written):
    table = samplers.build(method, schedule=VP, steps=5, prediction="sample", **options)
    assert [use.new_history for use in table.uses] == written


def test_weights_of_a_short_step():
    """Four values a hundred thousandth of a step apart, where the recursion of the integrals loses all digits."""
    grid = Grid(np.zeros(5), np.ones(5), np.exp(-1e-5 * np.arange(5.0)))
    points = Problem(KINDS["ve"], grid, "sample", None).points()
    move = quadrature(grid, np.eye(5), data=True)
    found = Interval(points[3], points[4], data=True).weights(points[3::-1])
    assert found == pytest.approx(move(3, np.zeros(5), [3, 2, 1, 0], np.zeros(5))[3::-1].tolist(), rel=1e-9)


@pytest.mark.parametrize("method", ["unipc", "deis", "sa_solver"])
def test_a_step_of_no_length_leaves_the_state(method):
    """Karras levels that repeat the last, as diffusers has them."""
    options = {"spacing": "karras", "endpoint": True, "final_sigma": "schedule", "lower_order_final": False}
    table = samplers.build(method, schedule=VP, steps=6, prediction="sample", **options)
    last = dict(zip(INPUTS, table.rows[-1, NEW_X].tolist(), strict=True))
    corrected = {"x": 1.0} if method == "deis" else {"anchor": 1.0, "D": table.rows[-1, NEW_X][2]}
    assert {name: value for name, value in last.items() if value} == corrected


OPTIONS = {
    "unipc": ("unipc", {}),
    "unipc-3": ("unipc", {"order": 3}),
    "unipc-bh1": ("unipc", {"order": 3, "variant": "bh1", "lower_order_final": False}),
    "unipc-exact": ("unipc", {"order": 3, "simplified": False}),
    "unipc-noise": ("unipc", {"order": 3, "predict": "noise"}),
    "unipc-noise-bh1": ("unipc", {"order": 2, "predict": "noise", "variant": "bh1", "lower_order_final": False}),
    "unipc-predictor": ("unipc", {"order": 3, "corrector": False, "lower_order_final": False}),
    "deis-1": ("deis", {"order": 1}),
    "deis": ("deis", {}),
    "deis-4": ("deis", {"order": 4, "lower_order_final": False}),
    "sa_solver-ode": ("sa_solver", {"tau": 0.0}),
    "sa_solver-exact": ("sa_solver", {"tau": 0.0, "predictor_order": 4, "corrector_order": 4, "simplified": False}),
    "sa_solver-noise": ("sa_solver", {"tau": 0.0, "predict": "noise", "lower_order_final": False}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", OPTIONS)
def test_constant_predictions_lead_straight_to_the_data(case, kind):
    """x = alpha c + sigma epsilon at every row's end, for 1, 2, 3 and 7 steps, without signal at first on a flow."""
    method, options = OPTIONS[case]
    clean, epsilon = np.array([0.3, -0.9]), np.array([1.1, 0.2])
    for steps in (1, 2, 3, 7):
        table = samplers.build(method, schedule=KINDS[kind], steps=steps, prediction="sample", **options)
        grid = table.grid
        found = trajectory(lambda *_: clean, table, grid.alphas[0] * clean + grid.sigmas[0] * epsilon)
        for i, x in enumerate(found, start=1):
            np.testing.assert_allclose(x, grid.alphas[i] * clean + grid.sigmas[i] * epsilon, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [case for case in OPTIONS if case != "deis-1"])
@pytest.mark.parametrize("kind", ["vp", "flow", "zero_snr"])
def test_the_last_step_reaches_the_data(case, kind):
    """From the schedule's noisiest point, where the flow has no signal, within 0.02 of the exact quantiles."""
    method, options = OPTIONS[case]
    table = samplers.build(method, schedule=KINDS[kind], steps=200, prediction="sample", **options)
    end = solve(Mixture().denoiser(KINDS[kind], "sample"), table, start_of(table))
    assert np.abs(end - Mixture().quantile(QUANTILES, 1.0, 0.0)).max() < 0.02


def test_a_clipped_prediction_moves_along_its_own_epsilon():
    """epsilon = (x - alpha D) / sigma with the clipped D."""
    table = samplers.build("deis", schedule=VP, steps=4, prediction="sample", clip=0.5, order=1)
    alphas, sigmas = table.grid.alphas, table.grid.sigmas
    found = trajectory(lambda *_: np.array([3.0]), table, alphas[:1] * 0.5 + sigmas[:1] * 0.7)
    for i, x in enumerate(found, start=1):
        assert x == pytest.approx(alphas[i] * 0.5 + sigmas[i] * 0.7, rel=1e-9)
    assert (table.rows[:, CLIP] == 0.5).all()


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("unipc", {"order": 4}, "unipc: order: expected a whole number from 1 to 3, got 4"),
        ("unipc", {"variant": "bh3"}, "unipc: variant: expected one of bh1, bh2"),
        ("unipc", {"predict": "v"}, "unipc: predict: expected one of data, noise"),
        ("unipc", {"corrector": 3}, "unipc: corrector: expected True, False or the steps"),
        ("unipc", {"corrector": [-1]}, "unipc: corrector: expected True, False or the steps"),
        ("deis", {"order": 0}, "deis: order: expected a whole number from 1 to 4, got 0"),
        ("sa_solver", {"predictor_order": 5}, "sa_solver: predictor_order: expected a whole number from 1 to 4"),
        ("sa_solver", {"corrector_order": -1}, "sa_solver: corrector_order: expected a whole number from 0 to 4"),
        ("sa_solver", {"tau": -0.5}, "sa_solver: tau: expected a number from 0 to 10"),
        ("sa_solver", {"tau_timesteps": 0.5}, "sa_solver: tau_timesteps: expected None or two numbers"),
        ("sa_solver", {"tau_ratios": (2.0, 1.0)}, "sa_solver: tau_ratios: expected 0 <= low <= high"),
    ],
    ids=str,
)
def test_bad_options_are_refused(method, options, message):
    with pytest.raises(InputError, match=message):
        samplers.build(method, schedule=VP, steps=5, prediction="v", **options)
