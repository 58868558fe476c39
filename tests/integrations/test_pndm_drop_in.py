"""PNDM, in all the ways that it is called, and improved PNDM against diffusers at every call."""

import numpy as np
import pytest
import torch
from drop_in import SHAPE, assert_close_in_half, assert_parity, network, pair, relative

PNDM, IPNDM = "PNDMScheduler", "IPNDMScheduler"
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
CONFIGS = {
    "defaults": {},
    "v": {"prediction_type": "v_prediction"},
    "alpha to one": {"set_alpha_to_one": True},
    "latent": {**LATENT, "skip_prk_steps": True, "steps_offset": 1},
    "latent v": {**LATENT, "skip_prk_steps": True, "prediction_type": "v_prediction"},
    "linspace": {"timestep_spacing": "linspace", "skip_prk_steps": True},
    "trailing": {"timestep_spacing": "trailing", "skip_prk_steps": True, "set_alpha_to_one": True},
    "cosine": {"beta_schedule": "squaredcos_cap_v2", "skip_prk_steps": True},
    "trained betas": {"trained_betas": np.linspace(1e-3, 0.15, 100), "num_train_timesteps": 100},
}
MIDDLE = {"Runge-Kutta": ({}, 3), "after it": ({}, 14), "plms": ({"skip_prk_steps": True}, 7)}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("steps", [2, 3, 7, 20])
def test_pndm_parity(config, steps):
    if steps < 4 and not config.get("skip_prk_steps"):
        steps += 4  # Runge-Kutta steps are four
    assert_parity(PNDM, config, steps=steps)


def test_one_step():
    assert_parity(PNDM, {"skip_prk_steps": True}, steps=1)


def test_as_many_steps_as_timesteps():
    assert_parity(PNDM, {"num_train_timesteps": 50, "beta_end": 0.2, "skip_prk_steps": True}, steps=50)


@pytest.mark.parametrize(("config", "skip"), MIDDLE.values(), ids=MIDDLE)
def test_pndm_from_the_middle(config, skip):
    assert_parity(PNDM, config, steps=12, skip=skip)


@pytest.mark.parametrize("options", [{"begin": 5}, {"skip": 5}], ids=["set_begin_index", "the timestep alone"])
def test_ipndm_from_the_middle(options):
    assert_parity(IPNDM, steps=12, **options)


@pytest.mark.parametrize("name", [PNDM, IPNDM])
@pytest.mark.parametrize("shape", [(2, 5), (2, 3, 7), (1, 2, 3, 4, 5)], ids=str)
def test_any_rank(name, shape):
    assert_parity(name, steps=6, shape=shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "config"),
    [(PNDM, {}), (PNDM, {"skip_prk_steps": True, "prediction_type": "v_prediction"}), (IPNDM, {})],
    ids=["pndm", "plms v", "ipndm"],
)
def test_half(name, config, dtype):
    assert_close_in_half(name, config, dtype)


@pytest.mark.parametrize("config", [{}, {"trained_betas": np.linspace(0.9, 0.1, 21)}], ids=["defaults", "trained"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_ipndm_parity(config, steps):
    assert_parity(IPNDM, config, steps=steps)


def both(name, config, calls):
    """What `calls` gives for ours and for theirs, all tensors of the same numbers."""
    results = []
    for scheduler in pair(name, config):
        scheduler.set_timesteps(10)
        results.append(calls(scheduler, torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))))
    for our, their in zip(*results, strict=True):
        assert relative(our, their) < 1e-5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_runge_kutta_and_multistep_called_directly(prediction):
    def calls(scheduler, x):
        for t in scheduler.prk_timesteps:
            x = scheduler.step_prk(network(x, t), t, x).prev_sample
            yield x
            yield torch.as_tensor(scheduler.cur_model_output).clone()  # theirs is added to in place
        for t in scheduler.plms_timesteps:
            x = scheduler.step_plms(network(x, t), t, x).prev_sample
            yield x
            yield from scheduler.ets[-4:]

    both(PNDM, {"prediction_type": prediction}, lambda scheduler, x: list(calls(scheduler, x)))


@pytest.mark.parametrize("order", ["pl", "ppplpp", "pppplpl", "lplplll", "pppppplp", "lllll"])
@pytest.mark.parametrize("time", [0, 1, 500, np.int64(300), torch.tensor(40)], ids=str)
def test_calls_in_any_order_from_a_given_state(order, time):
    def calls(scheduler, x):
        m = 0.1 * x
        scheduler.ets = [m + 0.2, m + 0.15, m + 0.1, m + 0.05]
        step = {"p": scheduler.step_prk, "l": scheduler.step_plms}
        return [step[kind](m * (1.0 + 0.1 * i), time, x).prev_sample for i, kind in enumerate(order)]

    both(PNDM, {}, calls)


def test_a_set_sum_of_outputs_counts():
    def calls(scheduler, x):
        scheduler.cur_model_output, scheduler.counter, scheduler.cur_sample = 0.3 * x.sin(), 2, 0.9 * x
        return [scheduler.step_prk(network(x, 0), t, x).prev_sample for t in scheduler.timesteps[2:8]]

    both(PNDM, {}, calls)


def test_the_rows_of_a_run_are_made_once(monkeypatch):
    scheduler = pair(PNDM)[0]
    plan, planned = type(scheduler)._plan, []
    monkeypatch.setattr(type(scheduler), "_plan", lambda self, *key: planned.append(key) or plan(self, *key))
    for config, start in (({}, 0), ({"skip_prk_steps": True}, 0), ({"skip_prk_steps": True}, 6)):
        scheduler = pair(PNDM, config)[0]
        scheduler.set_timesteps(12)
        planned.clear()
        x = torch.ones(SHAPE)
        for t in scheduler.timesteps[start:]:
            x = scheduler.step(network(x, t), t, x).prev_sample
        assert len(planned) == 1


def test_what_pndm_refuses():
    x = torch.zeros(SHAPE)
    for scheduler in pair(PNDM):
        with pytest.raises(ValueError, match="set_timesteps"):
            scheduler.step_plms(x, 1, x)
        scheduler.set_timesteps(10)
        with pytest.raises(ValueError, match="12"):
            scheduler.step_plms(x, 1, x)
    for scheduler in pair(PNDM, {"prediction_type": "sample"}):
        scheduler.set_timesteps(10)
        with pytest.raises(ValueError, match="epsilon"):
            scheduler.step(x, scheduler.timesteps[0], x)


def test_ipndm_again_without_forgetting():
    """diffusers divides by 1e-8 where alpha is 0, as at the first timestep, which earlier predictions show."""

    def calls(scheduler, x):
        for _ in range(2):
            scheduler._step_index = None
            for t in scheduler.timesteps:
                x = scheduler.step(0.5 * x, t, x).prev_sample
                yield x
        yield from scheduler.ets[-4:]

    both(IPNDM, {}, lambda scheduler, x: list(calls(scheduler, x)))


def test_ipndm_with_given_predictions():
    def calls(scheduler, x):
        scheduler.ets = [0.1 * x + 0.05 * i for i in range(5)]
        return [scheduler.step(0.2 * x, t, x).prev_sample for t in scheduler.timesteps[4:6]]

    both(IPNDM, {}, calls)


@pytest.mark.parametrize("skips", [True, False], ids=["plms", "Runge-Kutta"])
def test_pndm_with_a_timestep_of_one_element(skips):
    """It makes diffusers' coefficients tensors of one element, and so the result single precision."""
    x, results = torch.ones(SHAPE, dtype=torch.float16), []
    for scheduler in pair(PNDM, {"skip_prk_steps": skips}):
        scheduler.set_timesteps(5)
        results.append(scheduler.step(0.5 * x, scheduler.timesteps[:1], x).prev_sample)
    assert results[0].dtype == results[1].dtype
    assert relative(*results) < 1e-5
