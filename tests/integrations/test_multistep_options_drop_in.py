"""The exponential multistep classes against diffusers: levels, starts, shapes, dtypes, errors and what they keep."""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from drop_in import SHAPE, assert_close_in_half, assert_parity, network, pair, relative, with_variance
from interpret import trajectory
from multistep_cases import CLASSES, DEIS, EDM, INVERSE, MULTISTEP, SA, SCHEDULES, SINGLESTEP, UNIPC, orders
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import samplers, schedules
from fastdiff.ops.row import INPUTS, NEW_ANCHOR
from fastdiff.samplers.problem import Problem

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


LEVELS_OF = [
    pytest.param(name, config, id=f"{name}-{label}")
    for name in CLASSES[:-1]
    for label, config in LEVELS.items()
    if all(key in getattr(diffusers, name)().config for key in config)
]


@pytest.mark.parametrize(("name", "config"), LEVELS_OF)
def test_levels_and_bounds(name, config):
    # diffusers raises an error in UniPC's last step of order 3 to sigma 0.
    for order in (2,) if name == UNIPC and "lower_order_final" in config else (2, 3):
        assert_parity(name, {**config, **orders(name, order)}, steps=15)


@pytest.mark.parametrize("name", [name for name in CLASSES if name != INVERSE])
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
    for config in ({}, {"thresholding": True}, {"use_karras_sigmas": True}):
        if all(key in getattr(diffusers, name)().config for key in config):
            assert_close_in_half(name, {**config, **orders(name, 3)}, dtype)


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


@pytest.mark.parametrize(
    ("name", "config", "steps"),
    [
        (MULTISTEP, {"algorithm_type": "sde-dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"}, 6),
        (INVERSE, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, 6),
        (EDM, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, 6),
        (UNIPC, {"solver_order": 3, "lower_order_final": False}, 6),
        (SA, {"corrector_order": 0}, 6),
        (MULTISTEP, {"prediction_type": "unknown"}, 6),
        (DEIS, {"prediction_type": "unknown"}, 6),
        (SA, {"variance_type": "learned"}, 6),
    ],
    ids=str,
)
def test_the_same_error_at_the_same_step(name, config, steps):
    """Where diffusers has no such step."""
    model = with_variance if "variance_type" in config else network
    reached = []
    for scheduler in pair(name, config):
        scheduler.set_timesteps(steps)
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        for index, t in enumerate(scheduler.timesteps):
            try:
                x = scheduler.step(model(x, t), t, x, return_dict=False)[0]
            except Exception as error:
                reached.append((index, type(error)))
                break
    assert len(reached) == 2
    assert reached[0] == reached[1]


@pytest.mark.parametrize("name", CLASSES)
def test_steps_need_timesteps(name):
    x = torch.zeros(1, 3, 4, 4)
    for scheduler in pair(name):
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step(x, 1, x)


@pytest.mark.parametrize("name", CLASSES)
def test_a_step_can_be_repeated(name):
    """By a caller who puts back what diffusers counts and keeps."""
    scheduler, _ = pair(name, orders(name, 3))
    scheduler.set_timesteps(12)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma
    kept = ("_step_index", "lower_order_nums", "last_sample", "last_noise", "sample")
    for t in scheduler.timesteps:
        before = {key: getattr(scheduler, key) for key in kept if hasattr(scheduler, key)}
        outputs, results = list(scheduler.model_outputs), []
        for _ in range(2):
            vars(scheduler).update(before)
            scheduler.model_outputs = list(outputs)
            torch.manual_seed(3)
            results.append(scheduler.step(network(x, t), t, x, return_dict=False)[0])
        assert torch.equal(*results)
        x = results[0]


class NoReading(TorchDispatchMode):
    """Whatever waits for a device would ask for one of these."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert not any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", CLASSES)
def test_no_step_reads_a_tensor(name):
    scheduler, _ = pair(name)
    scheduler.set_timesteps(8)
    x = torch.randn(SHAPE)
    with NoReading():
        for t in scheduler.timesteps:
            x = scheduler.step(0.1 * x, t, x).prev_sample


@pytest.mark.parametrize("name", CLASSES)
def test_gradients(name):
    gradients = []
    for scheduler in pair(name):
        scheduler.set_timesteps(5)
        x = start = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
        for t in scheduler.timesteps[:3]:
            torch.manual_seed(0)
            x = scheduler.step(network(x, t), t, x).prev_sample
        gradients.append(torch.autograd.grad(x.square().sum(), start)[0])
    assert relative(*gradients) < 1e-5


def test_equal_runs_share_their_rows():
    tables = []
    for _ in range(2):
        scheduler, _ = pair(MULTISTEP)
        scheduler.set_timesteps(9)
        x = torch.randn(SHAPE)
        scheduler.step(x, scheduler.timesteps[0], x)
        tables.append(scheduler._run.table)
    assert tables[0] is tables[1]


@pytest.mark.parametrize(
    ("name", "method", "config", "options"),
    [
        (MULTISTEP, "dpmpp_2m", {}, {}),
        (MULTISTEP, "dpmpp_3m", {"solver_order": 3}, {"curvature": "half"}),
        (MULTISTEP, "dpmpp_2m_sde", {"algorithm_type": "sde-dpmsolver++"}, {}),
        (UNIPC, "unipc", {}, {}),
        (DEIS, "deis", {}, {}),
        (SA, "sa_solver", {}, {"tau_timesteps": (200, 800)}),
    ],
    ids=str,
)
def test_measured_rows_are_those_of_our_methods(name, method, config, options):
    """To the digits that diffusers' float32 coefficients have: the states along a run of either agree."""
    scheduler, _ = pair(name, {"prediction_type": "v_prediction", **SCHEDULES["scaled_linear"], **config})
    scheduler.set_timesteps(20)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scheduler.step(x, scheduler.timesteps[0], x)
    measured = scheduler._run.table
    # The last noise, which a row reads beside its anchor, as a part of the anchor that the row before it writes.
    rows, noise = measured.rows.copy(), NEW_ANCHOR.start + INPUTS.index("noise")
    rows[:-1, noise] = scheduler._steps.last_noise[1:]
    measured = measured.with_rows(rows)
    schedule = schedules.custom(scheduler.alphas_cumprod.double().numpy())
    problem = Problem(schedule, measured.grid, "v", None)
    tables = measured, samplers.find(method).rows(problem, **options)
    runs = [trajectory(lambda state, _: np.tanh(state), table, x.numpy(), _noise) for table in tables]
    for ours, exact in zip(*runs, strict=True):
        assert np.linalg.norm(ours - exact) < 2e-5 * np.linalg.norm(exact)


def _noise(row):
    return np.full(SHAPE, 0.1 * (row % 3))
