"""Each table against its closed form, written here again from the papers, one coefficient at a time."""

import math

import numpy as np
import pytest
from method_cases import fitting

from fastdiff import samplers, schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import (
    CLIP,
    GUIDANCE,
    INPUT_SCALE,
    INPUTS,
    KNOWN,
    NEW_ANCHOR,
    NEW_HISTORY,
    NEW_X,
    PREDICTION,
    VARIANCE,
)

SCHEDULE = schedules.linear(1000)
STEPS = 16
TIMESTEPS = [round(1000 * (STEPS - i) / STEPS) - 1 for i in range(STEPS)]


def build(method: str, prediction: str = "epsilon", **options) -> samplers.StepTable:
    return samplers.build(method, schedule=SCHEDULE, steps=STEPS, prediction=prediction, spacing="trailing", **options)


def block(table: samplers.StepTable, row: int, which: slice = NEW_X) -> dict[str, float]:
    """The nonzero coefficients of one output by the name of their input."""
    values = zip(INPUTS, table.rows[row, which].tolist(), strict=True)
    return {name: value for name, value in values if value != 0.0}


def level(i: int) -> tuple[float, float]:
    """(alpha, sigma) at point i of the grid; the last is the data."""
    return (float(SCHEDULE.alphas[TIMESTEPS[i]]), float(SCHEDULE.sigmas[TIMESTEPS[i]])) if i < STEPS else (1.0, 0.0)


def close(found: dict[str, float], expected: dict[str, float]) -> None:
    expected = {name: value for name, value in expected.items() if value != 0.0}
    assert found == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm(variance):
    """Ho et al. 2020, equations 6 and 7, with the betas of the thinned chain."""
    table = build("ddpm", variance=variance)
    for i in range(STEPS):
        bar, bar1 = level(i)[0] ** 2, level(i + 1)[0] ** 2
        beta = 1 - bar / bar1
        posterior = (1 - bar1) / (1 - bar) * beta
        std = math.sqrt(posterior if variance == "fixed_small" or i == STEPS - 1 else beta)
        expected = {
            "D": math.sqrt(bar1) * beta / (1 - bar),
            "x": math.sqrt(1 - beta) * (1 - bar1) / (1 - bar),
            "noise": std,
        }
        close(block(table, i), expected)


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim(eta):
    """Song et al. 2021, equations 12 and 16; epsilon is the network's own output here."""
    table = build("ddim", eta=eta)
    for i in range(STEPS):
        bar, bar1 = level(i)[0] ** 2, level(i + 1)[0] ** 2
        std = eta * math.sqrt((1 - bar1) / (1 - bar)) * math.sqrt(1 - bar / bar1)
        direction = math.sqrt(max(1 - bar1 - std**2, 0.0))
        close(block(table, i), {"D": math.sqrt(bar1), "m": direction, "noise": std})


def test_ddim_with_eta_1_is_ddpm():
    ddim, ddpm = build("ddim", clip=1.0, eta=1.0).rows, build("ddpm", clip=1.0).rows
    np.testing.assert_allclose(ddim, ddpm, rtol=1e-9, atol=1e-12)


def test_clipped_epsilon_leads_from_x_to_the_clipped_data():
    table = build("ddim", clip=1.0)
    for i in range(STEPS - 1):
        (alpha, sigma), (alpha1, sigma1) = level(i), level(i + 1)
        x, data = 0.3, 1.0
        found = block(table, i)
        epsilon = (x - alpha * data) / sigma
        assert found["x"] * x + found["D"] * data == pytest.approx(alpha1 * data + sigma1 * epsilon, rel=1e-12)


def test_euler():
    """y + (y - D) / r * (r' - r), in the space of Karras et al. 2022."""
    table = build("euler", "v")
    assert table.first_input_scale == pytest.approx(level(0)[0], rel=1e-12)
    assert table.init_scale == pytest.approx(1 / level(0)[0], rel=1e-12)
    for i in range(STEPS):
        (alpha, sigma), (alpha1, sigma1) = level(i), level(i + 1)
        r, r1 = sigma / alpha, sigma1 / alpha1
        close(block(table, i), {"x": 1 + (r1 - r) / r, "D": -(r1 - r) / r})
        ax, am = table.rows[i, PREDICTION]
        assert (ax, am) == pytest.approx((1 / (r * r + 1), -r / math.sqrt(r * r + 1)), rel=1e-9)
        assert table.rows[i, INPUT_SCALE] == pytest.approx(1 / math.sqrt(r1 * r1 + 1), rel=1e-9)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_euler_ancestral(eta):
    """k-diffusion's split of r' into a noise-free part and fresh noise."""
    table = build("euler_ancestral", eta=eta, s_noise=1.1)
    for i in range(STEPS):
        (alpha, sigma), (alpha1, sigma1) = level(i), level(i + 1)
        r, r1 = sigma / alpha, sigma1 / alpha1
        up = min(r1, eta * math.sqrt(r1**2 * (r**2 - r1**2) / r**2))
        down = math.sqrt(r1**2 - up**2)
        close(block(table, i), {"x": down / r, "D": 1 - down / r, "noise": 1.1 * up})


def test_heun():
    """Karras et al. 2022, algorithm 1: two rows a step that share an anchor, one for the step to the data."""
    table = build("heun", "v")
    assert len(table) == 2 * STEPS - 1
    points = [TIMESTEPS[0], *(t for t in TIMESTEPS[1:] for _ in range(2))]
    assert table.timesteps.tolist() == points
    for i in range(STEPS - 1):
        (alpha, sigma), (alpha1, sigma1) = level(i), level(i + 1)
        r, r1 = sigma / alpha, sigma1 / alpha1
        h = r1 - r
        close(block(table, 2 * i), {"x": 1 + h / r, "D": -h / r})
        close(block(table, 2 * i, NEW_ANCHOR), {"x": 1 + h / (2 * r), "D": -h / (2 * r)})
        close(block(table, 2 * i + 1), {"anchor": 1.0, "x": h / (2 * r1), "D": -h / (2 * r1)})
        assert block(table, 2 * i + 1, NEW_ANCHOR) == {}
    assert block(table, 2 * STEPS - 2) == {"D": 1.0}


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_dpmpp_2m(solver, eta):
    """Lu et al. 2022, algorithm 2, and its SDE form: in h = lambda' - lambda and r = h0 / h."""
    table = build("dpmpp_2m_sde", "v", solver=solver, eta=eta)
    lam = [math.log(alpha / sigma) for alpha, sigma in (level(i) for i in range(STEPS))]
    for i in range(STEPS - 1):
        (_, sigma), (alpha1, sigma1) = level(i), level(i + 1)
        h = lam[i + 1] - lam[i]
        total = 1 - math.exp(-(1 + eta) * h)
        second = 0.0
        if i > 0:
            r = (lam[i] - lam[i - 1]) / h
            factor = total / 2 if solver == "midpoint" else 1 - total / ((1 + eta) * h)
            second = alpha1 * factor / r
        expected = {
            "x": sigma1 / sigma * math.exp(-eta * h),
            "D": alpha1 * total + second,
            "hist1": -second,
            "noise": sigma1 * math.sqrt(1 - math.exp(-2 * eta * h)),
        }
        close(block(table, i), expected)
        assert block(table, i, NEW_HISTORY) == ({"D": 1.0} if i < STEPS - 2 else {})
    assert block(table, STEPS - 1) == {"D": 1.0}


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
def test_dpmpp_2m_is_its_sde_without_noise(solver):
    ode, sde = build("dpmpp_2m", "v", solver=solver), build("dpmpp_2m_sde", "v", solver=solver, eta=0.0)
    assert np.array_equal(ode.rows, sde.rows)


@pytest.mark.parametrize(("steps", "lowered"), [(14, True), (15, False)])
def test_lower_order_final(steps, lowered):
    options = {"schedule": SCHEDULE, "prediction": "v", "final_sigma": "schedule"}
    assert ("hist1" not in block(samplers.build("dpmpp_2m", steps=steps, **options), steps - 1)) == lowered
    for choice in (True, False):
        table = samplers.build("dpmpp_2m", steps=steps, lower_order_final=choice, **options)
        assert ("hist1" not in block(table, steps - 1)) == choice


def test_dpmpp_2m_starts_where_a_flow_schedule_has_no_signal():
    table = samplers.build("dpmpp_2m", schedule=schedules.flow(1000), steps=4, prediction="flow")
    t = [1.0, 0.75, 0.5, 0.25, 0.0]
    for i in (0, 1, 3):
        # Order 1: at the start, after it (where lambda was -inf), and to the data.
        close(block(table, i), {"x": t[i + 1] / t[i], "D": 1 - t[i + 1] / t[i]})
    assert "hist1" in block(table, 2)


@pytest.mark.parametrize("prediction", ["flow", "sample"])
def test_flow_euler(prediction):
    table = samplers.build("flow_euler", schedule=schedules.flow(1000), steps=5, prediction=prediction)
    for i in range(5):
        t, t1 = 1 - i / 5, 1 - (i + 1) / 5
        expected = {"x": 1.0, "m": t1 - t} if prediction == "flow" else {"x": t1 / t, "D": 1 - t1 / t}
        assert block(table, i) == pytest.approx({k: v for k, v in expected.items() if abs(v) > 1e-15}, rel=1e-12)


def rows_of(info: samplers.MethodInfo, steps: int) -> int:
    """How many rows a table of that many steps to the data has, with the method's own defaults."""
    extra = {
        "pndm": 3 * min(3, steps - 1),
        "plms": min(1, steps - 1),
        "restart": 18 * min(1, steps - 1),
        "heunpp2": -min(1, steps - 1),
    }
    return info.evaluations_per_step * (steps - 1) + 1 + extra.get(info.name, 0)


@pytest.mark.parametrize("method", samplers.methods())
def test_what_every_table_has_in_common(method):
    schedule, prediction = fitting(method)
    info = samplers.methods()[method]
    for steps in (1, 2, 3, 5, 20):
        table = samplers.build(method, schedule=schedule, steps=steps, prediction=prediction, clip=0.9)
        assert len(table) == rows_of(info, steps)
        assert (table.method, table.prediction, table.steps) == (method, prediction, steps)
        assert table.inverse == info.inverse
        assert table.rows.dtype == np.float64
        assert (table.rows[:, GUIDANCE] == 1.0).all()
        assert (table.rows[:, CLIP] == 0.9).all()
        assert (table.rows[:, VARIANCE] == 0.0).all()
        uses = table.uses
        data = table.init_level if info.inverse else tuple(table.rows[-1, KNOWN])
        assert data == (1.0, 0.0)
        assert any(use.noise for use in uses) == (info.stochastic and steps > 1)
        read = max(use.history for use in uses)
        assert read == info.history if steps == 20 else read <= info.history
        assert not uses[-1].new_history
        assert not uses[-1].noise
        assert table.grid.sigmas[0 if info.inverse else -1] == 0.0
        with pytest.raises(ValueError, match="read-only"):
            table.rows[0, 0] = 3.0


def test_the_float32_tensor_is_the_rounded_table():
    table = build("heun", "v")
    assert table.tensor().numpy().tolist() == table.rows.astype(np.float32).tolist()
    assert table.tensor() is table.tensor("cpu")
    guided = table.with_guidance(7.5)
    assert (guided.tensor()[:, GUIDANCE] == 7.5).all()
    assert (table.tensor()[:, GUIDANCE] == 1.0).all()


FLOW = schedules.flow(1000)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("dpmp_2m", {}, "did you mean 'dpmpp_2m'"),
        ("DDIM ", {}, "did you mean 'ddim'"),
        ("euler-ancestral", {}, "did you mean 'euler_ancestral'"),
        ("zzz", {}, "expected one of ddpm, ddim"),
        ("ddim", {"etta": 1.0}, "ddim: no option 'etta'; did you mean 'eta'"),
        ("euler", {"eta": 1.0}, "euler: no option 'eta'"),
        ("ddim", {"eta": 1.5}, "eta: expected a number from 0 to 1, got 1.5"),
        ("ddim", {"previous_timestep": "next"}, "previous_timestep: expected one of grid, stride"),
        ("ddpm", {"variance": "small"}, "variance: expected one of fixed_small, fixed_large"),
        ("dpmpp_2m", {"solver": "euler"}, "solver: expected one of midpoint, heun"),
        ("heun", {"initial": "zero"}, "initial: expected one of unit, sigma"),
        ("euler_ancestral", {"s_noise": float("nan")}, "s_noise: expected a number"),
        ("ddim", {"prediction": "eps"}, "prediction: expected one of epsilon, v, sample, flow, score, edm, got 'eps'"),
        ("ddim", {"prediction": "flow"}, "'flow' does not fit the vp schedule 'linear'; expected one of epsilon, v"),
        ("ddim", {"prediction": "v", "schedule": FLOW}, "'v' does not fit the flow schedule"),
        (
            "euler",
            {"prediction": "flow", "schedule": FLOW},
            "'flow' keeps no signal at its first timestep",
        ),
        (
            "flow_euler",
            {"prediction": "v"},
            "flow_euler: needs a flow schedule, got 'linear'",
        ),
        ("ddim", {"schedule": "cosine"}, "schedule: expected a Schedule, got 'cosine'"),
        ("ddim", {"clip": 0.0}, "clip: expected a positive number or None, got 0.0"),
        ("ddim", {"clip": True}, "clip: expected"),
        ("ddim", {"dynamic_threshold": 99.5}, "dynamic_threshold: expected a fraction above 0 and up to 1, got 99.5"),
        ("ddim", {"dynamic_threshold": 0.9, "dynamic_maximum": 0.5}, "dynamic_maximum: expected a number of at least"),
        ("ddim", {"steps": None}, "steps: expected"),
    ],
    ids=str,
)
def test_bad_requests_are_refused(method, arguments, message):
    with pytest.raises(InputError, match=message):
        samplers.build(method, **{"schedule": SCHEDULE, "steps": 10, "prediction": "epsilon", **arguments})
