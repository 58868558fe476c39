"""What each prediction says about the data and the noise."""

import numpy as np
import pytest

from fastdiff import parameterization, schedules
from fastdiff.errors import InputError

X0, EPSILON = 0.37, -1.21


def output(prediction: str, alpha: float, sigma: float, sigma_data: float) -> float:
    """What a perfect network gives for X0 and EPSILON."""
    x = alpha * X0 + sigma * EPSILON
    total = sigma**2 + sigma_data**2
    return {
        "epsilon": EPSILON,
        "sample": X0,
        "v": alpha * EPSILON - sigma * X0,
        "flow": EPSILON - X0,
        "score": (alpha * X0 - x) / sigma**2,
        "edm": (X0 - sigma_data**2 / total * x) / (sigma * sigma_data / total**0.5),
    }[prediction]


@pytest.mark.parametrize("prediction", parameterization.PREDICTIONS)
@pytest.mark.parametrize(("alpha", "sigma"), [(0.8, 0.6), (0.3, 0.7), (1.0, 0.002), (1.0, 80.0)])
@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_conversions_recover_data_and_noise(prediction, alpha, sigma, sigma_data):
    # Karras et al. have alpha = 1.
    alpha = 1.0 if prediction == "edm" else alpha
    x = alpha * X0 + sigma * EPSILON
    m = output(prediction, alpha, sigma, sigma_data)
    c0, c1 = parameterization.target(prediction, alpha, sigma, sigma_data)
    assert c0 * X0 + c1 * EPSILON == pytest.approx(m, rel=1e-9)
    data = parameterization.data(prediction, alpha, sigma, sigma_data=sigma_data)
    noise = parameterization.noise(prediction, alpha, sigma, sigma_data=sigma_data)
    # Terms as large as sigma cancel in the data, and 1/sigma as large in the noise.
    assert data.x * x + data.m * m == pytest.approx(X0, rel=1e-12, abs=1e-14 * sigma)
    assert noise.x * x + noise.m * m == pytest.approx(EPSILON, rel=1e-12, abs=1e-14 / sigma)
    scaled = parameterization.data(prediction, alpha, sigma, state_scale=alpha, sigma_data=sigma_data)
    assert scaled.x * (x / alpha) + scaled.m * m == pytest.approx(X0, rel=1e-12, abs=1e-14 * sigma)


@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_edm_is_table_1_of_karras(sigma):
    data = parameterization.data("edm", 1.0, sigma, sigma_data=0.7)
    assert data.x == pytest.approx(0.49 / (sigma**2 + 0.49), rel=1e-14)
    assert data.m == pytest.approx(sigma * 0.7 / (sigma**2 + 0.49) ** 0.5, rel=1e-14)
    scale = parameterization.input_scale("edm", 1.0, sigma, 0.7)
    assert scale == pytest.approx((sigma**2 + 0.49) ** -0.5, rel=1e-14)


@pytest.mark.parametrize("prediction", [name for name in parameterization.PREDICTIONS if name != "edm"])
def test_only_edm_scales_the_networks_input(prediction):
    assert parameterization.input_scale(prediction, 0.8, 0.6) == 1.0


@pytest.mark.parametrize("prediction", ["epsilon", "score"])
def test_noise_without_signal_is_refused(prediction):
    with pytest.raises(InputError, match="does not determine the data"):
        parameterization.data(prediction, 0.0, 1.0)


@pytest.mark.parametrize("prediction", ["v", "sample", "flow"])
def test_data_without_signal_is_what_the_network_says(prediction):
    m = output(prediction, 0.0, 1.0, 0.5)
    data = parameterization.data(prediction, 0.0, 1.0)
    assert data.x * EPSILON + data.m * m == pytest.approx(X0, rel=1e-14)


def test_a_score_without_noise_is_refused():
    with pytest.raises(InputError, match="'score' at sigma=0"):
        parameterization.data("score", 1.0, 0.0)


FITS = {
    "vp": (schedules.linear(10), {"epsilon", "v", "sample", "score"}),
    "flow": (schedules.flow(10), {"sample", "flow"}),
    "ve": (schedules.ve(10), {"epsilon", "sample", "score"}),
    "edm": (schedules.edm(10), {"epsilon", "sample", "score", "edm"}),
    "sub_vp": (schedules.sub_vp_sde(10), {"epsilon", "sample", "score"}),
}


@pytest.mark.parametrize("kind", FITS)
@pytest.mark.parametrize("prediction", parameterization.PREDICTIONS)
def test_predictions_fit_their_schedules(kind, prediction):
    schedule, fitting = FITS[kind]
    if prediction in fitting:
        parameterization.check(prediction, schedule)
        return
    names = ", ".join(name for name in parameterization.PREDICTIONS if name in fitting)
    with pytest.raises(InputError, match=f"does not fit the {schedule.kind} schedule.*expected one of {names}$"):
        parameterization.check(prediction, schedule)


def test_conversions_work_on_numpy_scalars():
    alpha, sigma = np.float64(1.0), np.float64(3.0)
    assert parameterization.data("score", alpha, sigma).m == pytest.approx(9.0, rel=1e-15)
