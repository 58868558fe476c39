"""The reverse SDE leaves the mixture's own distribution, with every predictor, with and without correctors."""

import numpy as np
import pytest
from interpret import solve
from mixture import Mixture
from stochastic import COUNT, KS_BOUND, VARIANCE_BOUND, figures

from fastdiff import samplers, schedules

CASES = {
    "vp": (schedules.vp_sde(1000), "v"),
    "ve": (schedules.ve(1000), "score"),
    "sub_vp": (schedules.sub_vp_sde(1000), "epsilon"),
    "flow": (schedules.flow(1000), "flow"),
}
PREDICTORS = ["reverse_diffusion", "euler_maruyama", "ancestral"]


def drawn(case: str, factor: float = 1.0, steps: int = 250, samples: int = 8, **options) -> np.ndarray:
    """COUNT values, as samples of many dimensions: a corrector's step follows from norms, which concentrate there."""
    mixture, generator = Mixture(), np.random.default_rng(5)
    schedule, prediction = CASES[case]
    table = samplers.build("reverse_sde", schedule=schedule, steps=steps, prediction=prediction, **options)
    shape = (samples, COUNT // samples)
    start = mixture.sample(generator, COUNT, table.grid.alphas[0], table.grid.sigmas[0]).reshape(shape)
    network = mixture.denoiser(schedule, prediction)
    return solve(network, table, start, lambda _: factor * generator.standard_normal(shape)).ravel()


DISTRIBUTIONS = {
    **{f"{case}-{name}": (case, {"predictor": name}) for case in ("vp", "ve", "sub_vp") for name in PREDICTORS},
    **{
        f"{case}-{name}-corrected": (case, {"predictor": name, "corrector_steps": 1, "snr": 0.1, "steps": 150})
        for case in ("vp", "ve", "sub_vp")
        for name in PREDICTORS
    },
    "vp-ancestral-twice": ("vp", {"predictor": "ancestral", "corrector_steps": 2, "snr": 0.1, "steps": 120}),
    "ve-none": ("ve", {"predictor": "none", "corrector_steps": 3, "snr": 0.17}),
    "flow-ancestral": ("flow", {"predictor": "ancestral"}),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_distribution(name):
    case, options = DISTRIBUTIONS[name]
    distance, mean, variance = figures(drawn(case, **options))
    assert distance < KS_BOUND
    assert mean < 4.0
    assert variance < VARIANCE_BOUND


@pytest.mark.parametrize("name", ["vp-euler_maruyama", "ve-reverse_diffusion-corrected", "vp-ancestral-twice"])
def test_a_wrong_noise_coefficient_is_seen(name):
    case, options = DISTRIBUTIONS[name]
    for factor in (0.75, 1.25):
        distance, _, variance = figures(drawn(case, factor, **options))
        assert distance > KS_BOUND
        assert variance > VARIANCE_BOUND
