"""The exponential multistep classes against diffusers at every step: every configuration value that changes numbers."""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from drop_in import SHAPE, assert_close_in_half, assert_parity, network, pair, relative, with_variance

MULTISTEP = "DPMSolverMultistepScheduler"
INVERSE = "DPMSolverMultistepInverseScheduler"
SINGLESTEP = "DPMSolverSinglestepScheduler"
UNIPC = "UniPCMultistepScheduler"
DEIS = "DEISMultistepScheduler"
SA = "SASolverScheduler"
EDM = "EDMDPMSolverMultistepScheduler"
CLASSES = (MULTISTEP, INVERSE, SINGLESTEP, UNIPC, DEIS, SA, EDM)
SCHEDULES = {
    "linear": {},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


def grid(**values):
    return [dict(zip(values, chosen, strict=True)) for chosen in itertools.product(*values.values())]


def orders(name, order):
    return {"predictor_order": order, "corrector_order": order} if name == SA else {"solver_order": order}


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


@pytest.mark.parametrize(
    ("name", "config"),
    [pytest.param(name, config, id=f"{name}-{config}") for name in SOLVERS for config in SOLVERS[name]],
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


LEVELS = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0},
    "flow with epsilon": {"use_flow_sigmas": True, "prediction_type": "epsilon"},
    "flow with v": {"use_flow_sigmas": True, "prediction_type": "v_prediction"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "zero terminal snr": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "clipped lambda": {"lambda_min_clipped": -5.1, **SCHEDULES["cosine"]},
    "euler at the end": {"euler_at_final": True},
    "full order at the end": {"lower_order_final": False},
    "thresholding": {"thresholding": True},
    "thresholding of samples": {"thresholding": True, "prediction_type": "sample", "sample_max_value": 2.0},
    "thresholding below 1": {"thresholding": True, "prediction_type": "v_prediction", "sample_max_value": 0.5},
}


@pytest.mark.parametrize("config", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("name", CLASSES[:-1])
def test_levels_and_bounds(name, config):
    known = getattr(diffusers, name)().config
    if not all(key in known for key in config):
        pytest.skip(f"{name} has no such option")
    for order in (2, 3):
        assert_parity(name, {**config, **orders(name, order)}, steps=15)


@pytest.mark.parametrize("name", [name for name in CLASSES if name not in (INVERSE,)])
def test_from_the_middle(name):
    for order in (2, 3):
        for begin in (0, 1, 5, 19):
            assert_parity(name, orders(name, order), steps=20, begin=begin)
            assert_parity(name, orders(name, order), steps=20, skip=begin)


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        (MULTISTEP, {}, {"timesteps": [900, 700, 650, 400, 20]}),
        (SINGLESTEP, {}, {"timesteps": [900, 700, 650, 400, 20]}),
        (MULTISTEP, {"use_flow_sigmas": True, "use_dynamic_shifting": True}, {"num_inference_steps": 9, "mu": 0.8}),
        (DEIS, {"use_flow_sigmas": True, "use_dynamic_shifting": True}, {"num_inference_steps": 9, "mu": 0.8}),
        (UNIPC, {"use_flow_sigmas": True, "use_dynamic_shifting": True}, {"num_inference_steps": 9, "mu": 0.8}),
        (UNIPC, {"use_flow_sigmas": True}, {"sigmas": np.array([1.0, 0.9, 0.6, 0.3, 0.1])}),
        (UNIPC, {"use_flow_sigmas": True, "shift_terminal": 0.1}, {"num_inference_steps": 9}),
    ],
    ids=str,
)
def test_options_of_set_timesteps(name, config, options):
    prediction = "flow_prediction" if config else "epsilon"
    assert_parity(name, {"prediction_type": prediction, **config}, steps=None, set_options=options)


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4), (2, 4, 3, 8, 8)], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_shapes_and_float64(name, shape):
    for dtype in (torch.float32, torch.float64):
        assert_parity(name, orders(name, 3), steps=6, shape=shape, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CLASSES)
def test_half(name, dtype):
    assert_close_in_half(name, {}, dtype)


@pytest.mark.parametrize("prediction", ["epsilon", "sample"])
@pytest.mark.parametrize("name", CLASSES[:-1])
def test_dtypes_that_differ(name, prediction):
    """The dtype of the result follows diffusers' own, which differs from class to class."""
    generator = torch.Generator().manual_seed(0)
    x, m = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    for first, second in itertools.permutations((torch.float32, torch.bfloat16, torch.float64), 2):
        results = []
        for scheduler in pair(name, {"prediction_type": prediction}):
            scheduler.set_timesteps(10)
            state, output, at = x.to(first), m.to(second), scheduler.timesteps[0]
            results.append(scheduler.step(output, at, state, return_dict=False)[0])
        assert results[0].dtype == results[1].dtype
        assert relative(*results) < (1e-2 if torch.bfloat16 in (first, second) else 1e-5)


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
@pytest.mark.parametrize("name", [MULTISTEP, INVERSE, SINGLESTEP])
def test_learned_variances_are_left_out(name, algorithm):
    config = {"variance_type": "learned_range", "algorithm_type": algorithm}
    assert_parity(name, config, steps=6, shape=(2, 3, 8, 8), model=with_variance)


@pytest.mark.parametrize("name", [MULTISTEP, INVERSE])
def test_given_noise(name):
    noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    assert_parity(name, {"algorithm_type": "sde-dpmsolver++"}, steps=6, step_options={"variance_noise": noise})
