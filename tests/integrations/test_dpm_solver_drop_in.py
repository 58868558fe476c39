"""The multistep classes against diffusers at every step."""

import pytest
import torch
from drop_in import assert_close_in_half, assert_parity

NAME = "DPMSolverMultistepScheduler"
CONFIGS = {
    "defaults": {},
    "order 1": {"solver_order": 1},
    "order 3": {"solver_order": 3},
    "sde": {"algorithm_type": "sde-dpmsolver++"},
    "karras v": {"use_karras_sigmas": True, "prediction_type": "v_prediction"},
    "zero terminal SNR": {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    "threshold": {"thresholding": True, "prediction_type": "sample"},
    "flow": {"use_flow_sigmas": True, "prediction_type": "flow_prediction"},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_multistep_parity(config):
    for steps in (1, 7, 20):
        assert_parity(NAME, config, steps=steps)


@pytest.mark.parametrize("options", [{"begin": 5}, {"skip": 5}], ids=["set_begin_index", "the timestep alone"])
def test_multistep_from_the_middle(options):
    assert_parity(NAME, {"solver_order": 3}, steps=20, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_multistep_half(dtype):
    assert_close_in_half(NAME, {}, dtype)
