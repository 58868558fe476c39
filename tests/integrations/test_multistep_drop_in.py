"""The exponential multistep classes against diffusers at every step: every solver, schedule and prediction."""

import itertools

import pytest
from drop_in import assert_parity, network
from multistep_cases import CLASSES, DEIS, EDM, INVERSE, MULTISTEP, SA, SCHEDULES, SINGLESTEP, UNIPC, orders


def grid(**values):
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def like_the_library(x, t):
    """What diffusers' own tests take for a network; at late timesteps it leaves nearly nothing of the state."""
    return x * t / (t + 1)


SOLVERS = {
    MULTISTEP: [
        *grid(
            solver_order=(1, 2, 3),
            algorithm_type=("dpmsolver++", "sde-dpmsolver++"),
            solver_type=("midpoint", "heun"),
            final_sigmas_type=("zero", "sigma_min"),
        ),
        *grid(
            solver_order=(1, 2, 3),
            algorithm_type=("dpmsolver",),
            solver_type=("midpoint", "heun"),
            final_sigmas_type=("sigma_min",),
        ),
        *grid(solver_order=(1, 2), algorithm_type=("sde-dpmsolver",), final_sigmas_type=("sigma_min",)),
    ],
    INVERSE: [
        *grid(solver_order=(1, 2, 3), algorithm_type=("dpmsolver++", "dpmsolver"), solver_type=("midpoint", "heun")),
        *grid(solver_order=(1, 2), algorithm_type=("sde-dpmsolver++", "sde-dpmsolver")),
    ],
    SINGLESTEP: [
        *grid(
            solver_order=(1, 2, 3), algorithm_type=("dpmsolver++", "sde-dpmsolver++"), solver_type=("midpoint", "heun")
        ),
        *grid(
            solver_order=(2, 3),
            algorithm_type=("dpmsolver", "sde-dpmsolver++"),
            lower_order_final=(False, True),
            final_sigmas_type=("sigma_min",),
        ),
    ],
    UNIPC: [
        *grid(solver_order=(1, 2, 3), solver_type=("bh1", "bh2"), final_sigmas_type=("zero", "sigma_min")),
        *grid(solver_order=(2, 3), predict_x0=(False,), final_sigmas_type=("sigma_min",)),
        {"disable_corrector": [0, 1, 4]},
    ],
    DEIS: grid(solver_order=(1, 2, 3)),
    SA: [
        *grid(predictor_order=(1, 2, 3, 4), corrector_order=(1, 2, 4)),
        *grid(predictor_order=(2, 3), algorithm_type=("noise_prediction",)),
        {"tau_func": lambda t: 0.0},
        {"tau_func": lambda t: t / 1000, "predictor_order": 3},
    ],
    EDM: [
        *grid(
            solver_order=(1, 2, 3), algorithm_type=("dpmsolver++", "sde-dpmsolver++"), solver_type=("midpoint", "heun")
        )[:-2],
        {"sigma_schedule": "exponential", "final_sigmas_type": "sigma_min"},
        {"sigma_max": 20.0, "sigma_data": 1.0, "rho": 3.0, "prediction_type": "v_prediction"},
    ],
}


def label(config):
    """Equal in every process, as a function's address is not."""
    return ", ".join(key if callable(value) else f"{key}={value}" for key, value in config.items())


@pytest.mark.parametrize(
    ("name", "config"),
    [pytest.param(name, config, id=f"{name}-{label(config)}") for name in SOLVERS for config in SOLVERS[name]],
)
def test_every_solver(name, config):
    for steps in (2, 7):
        assert_parity(name, config, steps=steps)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", CLASSES[:-1])
def test_every_schedule_and_prediction(name, schedule):
    for prediction in ("epsilon", "v_prediction", "sample"):
        for steps, model in ((1, network), (3, network), (7, like_the_library), (16, network)):
            assert_parity(name, {"prediction_type": prediction, **SCHEDULES[schedule]}, steps=steps, model=model)


@pytest.mark.parametrize(("steps", "skip"), [(999, 979), (1000, 490)], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_nearly_as_many_steps_as_timesteps(name, steps, skip):
    """Where the float32 coefficients of diffusers keep few digits, and where it has a timestep twice."""
    assert_parity(name, orders(name, 2 if name == UNIPC else 3), steps=steps, skip=skip, shape=(1, 2, 4, 4))
