"""The probability-flow ODE and the reverse SDE: loops from the paper, orders, and diffusers."""

from itertools import pairwise

import diffusers
import numpy as np
import pytest
import torch
from convergence import STEPS, assert_order
from diffusers_peer import ROUNDING, relative
from interpret import apply_row, trajectory

from fastdiff import samplers, schedules
from fastdiff.errors import InputError
from fastdiff.ops.row import CLIP, INPUTS, KNOWN, NEW_ANCHOR, NEW_X

LINEAR = schedules.linear(1000)
VP, SUB_VP, VE = schedules.vp_sde(1000), schedules.sub_vp_sde(1000), schedules.ve(1000)
FLOW = schedules.flow(1000)
CASES = {"vp": (VP, "v"), "ve": (VE, "score"), "sub_vp": (SUB_VP, "epsilon"), "flow": (FLOW, "flow")}
PREDICTORS = ["reverse_diffusion", "euler_maruyama", "ancestral"]


def build(method: str, steps: int | None, case: str = "vp", **options) -> samplers.StepTable:
    schedule, prediction = CASES[case]
    return samplers.build(method, schedule=schedule, steps=steps, prediction=prediction, **options)


def clean(x: np.ndarray) -> np.ndarray:
    """The data that the test's network sees, whatever it predicts."""
    return np.tanh(x)


class Process:
    """Song et al. 2021, appendix B and C, and the straight path, written again: all as functions of the time s."""

    def __init__(self, case: str):
        self.case = case

    def _integral(self, s: float) -> float:
        return 0.1 * s + 0.5 * 19.9 * s * s

    def level(self, s: float) -> tuple[float, float]:
        b = self._integral(s)
        return {
            "vp": (np.exp(-b / 2), np.sqrt(-np.expm1(-b))),
            "sub_vp": (np.exp(-b / 2), -np.expm1(-b)),
            "ve": (1.0, 0.01 * 5000.0**s),
            "flow": (1.0 - s, s),
        }[self.case]

    def rates(self, s: float) -> tuple[float, float]:
        beta = 0.1 + 19.9 * s
        return {
            "vp": (-beta / 2, beta),
            "sub_vp": (-beta / 2, beta * -np.expm1(-2 * self._integral(s))),
            "ve": (0.0, 2 * self.level(s)[1] ** 2 * np.log(5000.0)),
            "flow": (-1 / (1 - s), 2 * s / (1 - s)) if s < 1.0 else (-np.inf, np.inf),
        }[self.case]

    def score(self, x: np.ndarray, s: float) -> np.ndarray:
        alpha, sigma = self.level(s)
        return (alpha * clean(x) - x) / sigma**2

    def data(self, x: np.ndarray, s: float) -> np.ndarray:
        alpha, sigma = self.level(s)
        return (x + sigma**2 * self.score(x, s)) / alpha

    def model(self, x: np.ndarray, s: float) -> np.ndarray:
        """What a network of each case's prediction gives."""
        alpha, sigma = self.level(s)
        noise = (x - alpha * clean(x)) / sigma
        return {
            "vp": alpha * noise - sigma * clean(x),
            "sub_vp": noise,
            "ve": -noise / sigma,
            "flow": noise - clean(x),
        }[self.case]

    def network(self):
        time = {"vp": lambda t: t / 999, "sub_vp": lambda t: t / 999, "flow": lambda t: t / 1000}
        time["ve"] = lambda t: np.log(t / 0.01) / np.log(5000.0)
        return lambda x, t: self.model(x, time[self.case](t))


def times_of(case: str, steps: int) -> np.ndarray:
    """Even in time, from 1 to the clean end of each process."""
    return np.linspace(1.0, {"vp": 1e-3, "sub_vp": 1e-3, "ve": 0.0, "flow": 1e-3}[case], steps)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_pf_ode_is_the_papers(case, order):
    """Equation 13 by Euler or Heun, and the last noise removed."""
    process, steps = Process(case), 9
    table = build("pf_ode", steps, case, order=order)
    times = times_of(case, steps)

    def velocity(x, s):
        if case == "flow" and s == 1.0:
            return x - clean(x)
        f, g2 = process.rates(s)
        return f * x - 0.5 * g2 * process.score(x, s)

    x = np.linspace(-1.5, 1.5, 7)
    states = trajectory(process.network(), table, x)
    for s, s1 in pairwise(times):
        v, h = velocity(x, s), s1 - s
        euler = x + h * v
        np.testing.assert_allclose(next(states), euler, rtol=1e-9, atol=1e-9 * np.abs(euler).max())
        x = euler
        if order == 2:
            x = x + 0.5 * h * (velocity(euler, s1) - v)
            np.testing.assert_allclose(next(states), x, rtol=1e-9, atol=1e-9 * np.abs(euler).max())
    np.testing.assert_allclose(next(states), process.data(x, times[-1]), rtol=1e-9, atol=1e-9)
    assert next(states, None) is None


@pytest.mark.parametrize("spacing", ["linspace", "karras"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_order_of_pf_ode(case, order, spacing):
    # Below 240 steps the slope of Euler on the VE schedule still falls before it rises to 1.
    step_counts = (240, 480, 960) if (case, order) == ("ve", 1) else STEPS
    assert_order(order, "pf_ode", *CASES[case], spacing, step_counts, order=order)
    assert samplers.methods()["pf_ode"].order == 2


@pytest.mark.parametrize("schedule", [FLOW, schedules.zero_terminal_snr(LINEAR), schedules.crash(1000)], ids=str)
def test_the_limit_without_signal(schedule):
    """d alpha/ds D + d sigma/ds epsilon at alpha = 0, where f and g are infinite, by differences of the schedule."""
    prediction = "flow" if schedule.kind == "flow" else "v"
    table = samplers.build("pf_ode", schedule=schedule, steps=8, prediction=prediction, order=1)
    t, t1 = table.timesteps[:2]
    h = float(schedule.time(t1) - schedule.time(t))
    row = dict(zip(INPUTS, table.rows[0, NEW_X].tolist(), strict=True))
    step = 1e-4
    alpha, sigma = schedule.at(schedule.curve.timestep(1.0 - step))
    assert row["D"] / h == pytest.approx(-alpha / step, rel=1e-5)
    assert (row["x"] - 1.0) / h == pytest.approx((1.0 - sigma) / step, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("corrections", [0, 1, 2])
@pytest.mark.parametrize("predictor", [*PREDICTORS, "none"])
@pytest.mark.parametrize("case", ["vp", "ve", "sub_vp"])
def test_reverse_sde_is_the_papers(case, predictor, corrections):
    """Algorithm 1: correctors, then the predictor, at each time; the last step without noise."""
    if predictor == "none" and corrections == 0:
        with pytest.raises(InputError, match="predictor='none' needs at least 1"):
            build("reverse_sde", 6, case, predictor=predictor, corrector_steps=corrections)
        return
    process, steps, generator = Process(case), 6, np.random.default_rng(2)
    table = build("reverse_sde", steps, case, predictor=predictor, corrector_steps=corrections, snr=0.1)
    times = times_of(case, steps)
    x = generator.standard_normal((3, 5, 4)) * process.level(1.0)[1]
    drawn = generator.standard_normal((len(table), *x.shape))
    states = list(trajectory(process.network(), table, x, lambda row: drawn[row]))
    row, norm = 0, lambda value: np.sqrt((value**2).sum(axis=(1, 2), keepdims=True))
    for i, s in enumerate(times):
        alpha, sigma = process.level(s)
        alpha1, sigma1 = process.level(times[i + 1]) if i + 1 < steps else (1.0, 0.0)
        a = alpha / alpha1
        added = sigma**2 - a**2 * sigma1**2
        for _ in range(corrections):
            score = process.score(x, s)
            size = 2 * a**2 * (0.1 * norm(drawn[row]) / norm(score)) ** 2
            x = x + size * score + np.sqrt(2 * size) * drawn[row]
            np.testing.assert_allclose(states[row], x, rtol=1e-9, atol=1e-9 * np.abs(x).max())
            row += 1
        if i + 1 == steps:
            x = process.data(x, s)
        elif predictor == "none":
            continue
        else:
            score, z = process.score(x, s), drawn[row]
            if predictor == "reverse_diffusion":
                x = x - (a - 1) * x + added * score + np.sqrt(added) * z
            elif predictor == "ancestral":
                variance = added if case == "vp" else sigma1**2 * added / sigma**2
                x = (x + added * score) / a + np.sqrt(variance) * z
            else:
                (f, g2), dt = process.rates(s), s - times[i + 1]
                x = x - (f * x - g2 * score) * dt + np.sqrt(g2 * dt) * z
        np.testing.assert_allclose(states[row], x, rtol=1e-9, atol=1e-9 * np.abs(x).max())
        row += 1
    assert row == len(table)


def test_ancestral_on_a_discrete_schedule_is_equation_4():
    """x = (x + beta score) / sqrt(1 - beta) + sqrt(beta) z with the schedule's own betas, and DDPM's large variance."""
    beta = np.linspace(1e-4, 0.02, 1000)
    options = {"schedule": LINEAR, "steps": 1000, "prediction": "epsilon", "spacing": "linspace"}
    rows = samplers.build("reverse_sde", predictor="ancestral", **options).rows
    bar = np.cumprod(1 - beta)
    for i, row in enumerate(rows[:-1]):
        t = 999 - i
        ax, am = row[1:3]
        coefficients = dict(zip(INPUTS, row[NEW_X], strict=True))
        assert coefficients["noise"] == pytest.approx(np.sqrt(beta[t]), rel=1e-9)
        x, m = coefficients["x"] + coefficients["D"] * ax, coefficients["D"] * am
        assert x == pytest.approx(1 / np.sqrt(1 - beta[t]), rel=1e-9)
        assert m == pytest.approx(-beta[t] / np.sqrt(1 - bar[t]) / np.sqrt(1 - beta[t]), rel=1e-9)
    ddpm = samplers.build("ddpm", variance="fixed_large", **options)
    np.testing.assert_allclose(rows, ddpm.rows, rtol=1e-9, atol=1e-12)


def test_rates_of_a_discrete_schedule_are_those_of_the_cleaner_side():
    """g^2 = 2 sigma^2 d ln(sigma / alpha) / ds between a timestep and the one before, s = (t + 1) / 1000."""
    table = samplers.build(
        "reverse_sde", schedule=LINEAR, steps=1000, prediction="v", spacing="linspace", predictor="euler_maruyama"
    )
    logs = np.log(LINEAR.noise_ratios)
    for row, t in zip(table.rows[:-1], range(999, 0, -1), strict=True):
        g2 = 2000 * LINEAR.sigmas[t] ** 2 * (logs[t] - logs[t - 1])
        assert row[NEW_X][INPUTS.index("noise")] == pytest.approx(np.sqrt(g2 / 1000), rel=1e-8)


def test_correctors_carry_no_bound_and_end_at_their_own_level():
    table = build("reverse_sde", 4, clip=1.0, corrector_steps=2)
    assert table.snr.tolist() == [0.16, 0.16, 0.0] * 4
    assert np.isinf(table.rows[table.snr > 0, CLIP]).all()
    assert (table.rows[table.snr == 0, CLIP] == 1.0).all()
    for i in range(4):
        for row in (3 * i, 3 * i + 1):
            assert tuple(table.rows[row, KNOWN]) == tuple(table.levels[3 * i])
    assert not table.rows[:, NEW_ANCHOR].any()
    alone = build("reverse_sde", 4, predictor="none", corrector_steps=2)
    assert alone.snr.tolist() == [0.16] * 8 + [0.0]
    assert tuple(alone.rows[1, KNOWN]) == (table.grid.alphas[1], table.grid.sigmas[1])


@pytest.mark.parametrize(("steps", "corrections"), [(2, 1), (25, 1), (12, 3)])
def test_score_sde_ve_is_diffusers(steps, corrections):
    """Batch 1: their correctors average the norms over the batch."""
    for row, (error, bound) in enumerate(beside(steps, corrections, batch=1)):
        assert error < bound, f"row {row}: relative error {error:.1e}, bound {bound:.1e}"


def test_samples_do_not_depend_on_the_batch():
    """Theirs do, from the first corrector on."""
    assert all(error > bound for error, bound in beside(10, 1, batch=2, corrector=True))
    assert all(error < bound for error, bound in beside(10, 1, batch=2, corrector=False))


def beside(steps: int, corrections: int, *, batch: int, corrector: bool | None = None):
    """The relative error of each state, from the same state, score and noise as theirs, called as their pipeline does,
    and its bound: float32's rounding of terms that cancel where a step crosses orders of magnitude."""
    scheduler = diffusers.ScoreSdeVeScheduler()
    scheduler.set_timesteps(steps)
    scheduler.set_sigmas(steps)
    schedule = schedules.ve(2000, sigma_min=0.01, sigma_max=1348.0)
    options = {**samplers.methods()["reverse_sde"].diffusers, "corrector_steps": corrections}
    table = samplers.build("reverse_sde", schedule=schedule, steps=steps, prediction="score", **options)
    np.testing.assert_allclose(table.timesteps[:: corrections + 1], scheduler.discrete_sigmas.flip(0), rtol=1e-5)
    assert table.init_scale == pytest.approx(scheduler.init_noise_sigma)
    generator, twin = (torch.Generator().manual_seed(7) for _ in range(2))
    shape = (batch, 3, 8, 8)
    x = table.init_scale * torch.randn(shape, generator=torch.Generator().manual_seed(3))
    for row, (values, snr) in enumerate(zip(table.rows, table.snr, strict=True)):
        i = row // (corrections + 1)
        sigma = float(scheduler.discrete_sigmas[steps - 1 - i])
        score = (torch.tanh(x) * torch.linspace(0.3, 1.0, batch).view(-1, 1, 1, 1) - x) / sigma**2
        if snr:
            theirs = scheduler.step_correct(score, x, generator=generator).prev_sample
        else:
            step = scheduler.step_pred(score, scheduler.timesteps[i], x, generator=generator)
            # Their pipeline returns the mean of the last step.
            theirs = step.prev_sample if row + 1 < len(table) else step.prev_sample_mean
        z = torch.randn(shape, generator=twin)
        ours = apply_row(values, x.double().numpy(), score.double().numpy(), None, [], z.double().numpy(), snr)[0]
        if corrector is None or corrector == bool(snr):
            error = relative(torch.from_numpy(ours), theirs)
            yield error, 1e-5 + 4.0 * ROUNDING * 2.0 * float(x.norm() / theirs.norm())
        x = theirs


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("pf_ode", {"order": 3}, "order: expected a whole number from 1 to 2, got 3"),
        ("reverse_sde", {"predictor": "euler"}, "predictor: expected one of reverse_diffusion, euler_maruyama"),
        ("reverse_sde", {"predictor": "none"}, "corrector_steps: predictor='none' needs at least 1"),
        ("reverse_sde", {"corrector_steps": 1.5}, "corrector_steps: expected a whole number"),
        ("reverse_sde", {"snr": 0.0}, "reverse_sde: snr: expected a positive number"),
    ],
    ids=str,
)
def test_bad_requests_are_refused(method, options, message):
    with pytest.raises(InputError, match=message):
        build(method, 4, **options)


@pytest.mark.parametrize("predictor", PREDICTORS)
@pytest.mark.parametrize("schedule", [FLOW, schedules.zero_terminal_snr(LINEAR)], ids=str)
def test_only_ancestral_starts_without_signal(schedule, predictor):
    arguments = {"schedule": schedule, "steps": 5, "prediction": "flow" if schedule is FLOW else "v"}
    if predictor == "ancestral":
        table = samplers.build("reverse_sde", predictor=predictor, corrector_steps=1, **arguments)
        # Nothing is known at the first point, which has no correctors.
        assert table.snr.tolist() == [0.0, *[0.16, 0.0] * 4]
    else:
        with pytest.raises(InputError, match="only predictor='ancestral' can start from"):
            samplers.build("reverse_sde", predictor=predictor, **arguments)
