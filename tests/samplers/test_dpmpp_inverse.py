"""DPM-Solver++ from an image to its noise: against the paper's integrals, the mixture's own flow, and diffusers."""

import diffusers
import numpy as np
import pytest
from diffusers_peer import SCHEDULES, assert_parity
from interpret import solve, trajectory
from lambda_integral import integral
from mixture import Mixture

from fastdiff import samplers, schedules
from fastdiff.errors import InputError

VP = schedules.linear(1000)
KINDS = {
    "vp": (VP, "v", {}),
    "cosine": (schedules.cosine(1000), "epsilon", {"spacing": "karras"}),
    "to-no-signal": (schedules.flow(1000), "flow", {}),
    "from-noise": (VP, "sample", {"final_sigma": "schedule"}),
}
CASES = {
    "midpoint": {},
    "heun": {"solver": "heun"},
    "order1": {"order": 1},
    "order3": {"order": 3, "lower_order_final": False},
    "half": {"order": 3, "curvature": "half"},
}
X = np.linspace(-2.0, 2.0, 7)


def states(grid, *, order=2, solver="midpoint", curvature="exact", lower_order_final=None):
    """The states after each step, with the exact denoiser."""
    x, steps, past, places = X, grid.steps, [], []
    lowered = steps < 15 if lower_order_final is None else lower_order_final
    with np.errstate(divide="ignore"):
        lam = np.log(grid.alphas / grid.sigmas)
    for i in range(steps):
        (alpha, alpha1), (sigma, sigma1) = grid.alphas[i : i + 2], grid.sigmas[i : i + 2]
        data = Mixture().denoise(x, alpha, sigma)
        past, places = [data, *past][:3], [lam[i], *places][:3]
        possible = min(order, sum(np.isfinite(places)), steps - i if lowered else order)
        if np.isinf(lam[i]):
            # No noise yet: the flow leaves x_0 along the noise that the network sees, which is 0 on average.
            x = alpha1 * x
        elif possible < 2 or np.isinf(lam[i + 1]):
            x = alpha1 * data + sigma1 * (x - alpha * data) / sigma
        else:
            h, earlier = lam[i + 1] - lam[i], [place - lam[i] for place in places[1:possible]]
            how = ("heun" if possible == 3 else solver), curvature == "half"
            x = sigma1 / sigma * x + alpha1 * integral(-1.0, h, past[:possible], earlier, *how)
        yield x


def network(schedule, prediction):
    """The exact one; at sigma = 0 it sees no noise."""
    exact = Mixture().denoiser(schedule, prediction)

    def at(x, t):
        sigma = float(schedule.at(t)[1])
        return exact(x, t) if sigma > 0.0 else {"epsilon": 0.0 * x, "v": 0.0 * x, "flow": -x}[prediction]

    return at


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_states(case, kind):
    schedule, prediction, options = KINDS[kind]
    for steps in (1, 2, 3, 5, 16):
        common = {"schedule": schedule, "steps": steps, "prediction": prediction, **options}
        table = samplers.build("dpmpp_inverse", **common, **CASES[case])
        down = samplers.build("dpmpp_2m", **common)
        np.testing.assert_array_equal(table.grid.sigmas, down.grid.sigmas[::-1])
        found = trajectory(_told(table, network(schedule, prediction)), table, X)
        for ours, theirs in zip(found, states(table.grid, **CASES[case]), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)


def _told(table, at):
    """The network of a first point at sigma = 0, which training timestep 0 stands for."""
    calls = iter(range(len(table)))

    def network(x, t):
        if next(calls) == 0 and table.grid.sigmas[0] == 0.0:
            return {"flow": -x}.get(table.prediction, 0.0 * x)
        return at(x, t)

    return network


@pytest.mark.parametrize(("order", "options"), [(1, {"order": 1}), (2, {}), (2, {"solver": "heun"})], ids=str)
def test_order_of_convergence(order, options):
    """Quantiles of the data, a little noised, go to the same quantiles of the noise."""
    mixture, p, errors = Mixture(), np.linspace(0.02, 0.98, 25), []
    ends = {"spacing": "karras", "sigma_min": 0.05, "sigma_max": 50.0, "final_sigma": "schedule"}
    for steps in (160, 320, 640):
        table = samplers.build(
            "dpmpp_inverse", schedule=VP, steps=steps, prediction="v", lower_order_final=False, **ends, **options
        )
        levels = [*zip(table.grid.alphas, table.grid.sigmas, strict=True)]
        found = solve(mixture.denoiser(VP, "v"), table, mixture.quantile(p, *levels[0]))
        errors.append(np.sqrt(np.mean((found - mixture.quantile(p, *levels[-1])) ** 2)))
    assert np.log2(errors[1] / errors[2]) == pytest.approx(order, abs=0.06)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("config", "options"),
    [
        ({}, {}),
        ({"solver_type": "heun"}, {"solver": "heun"}),
        ({"solver_order": 1}, {"order": 1}),
        ({"solver_order": 3}, {"order": 3}),
        ({"solver_order": 3, "lower_order_final": False}, {"order": 3, "lower_order_final": False}),
        ({"euler_at_final": True}, {"euler_at_final": True}),
    ],
    ids=str,
)
def test_diffusers(config, options, schedule, prediction):
    names = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
    for steps in (1, 2, 7, 20):
        scheduler = diffusers.DPMSolverMultistepInverseScheduler(
            1000, prediction_type=names[prediction], **SCHEDULES[schedule], **config
        )
        own = schedules.custom(scheduler.alphas_cumprod.double().numpy())
        chosen = {**samplers.methods()["dpmpp_inverse"].diffusers, **options}
        table = samplers.build("dpmpp_inverse", schedule=own, steps=steps, prediction=prediction, **chosen)
        scheduler.set_timesteps(steps)
        assert_parity(table, scheduler)


def test_a_sample_prediction_needs_noise_to_start_from():
    with pytest.raises(InputError, match="does not determine the data"):
        samplers.build("dpmpp_inverse", schedule=VP, steps=5, prediction="sample")
