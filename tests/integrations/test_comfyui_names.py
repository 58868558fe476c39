"""ComfyUI's names and signatures."""

import inspect

import pytest
from comfyui_peer import NAMES, STEPPED

from fastdiff.integrations import k_diffusion
from fastdiff.integrations.k_diffusion import comfyui

CHURN = {"s_churn": 0.0, "s_tmin": 0.0, "s_tmax": float("inf"), "s_noise": 1.0}
NOISE = {"s_noise": 1.0, "noise_sampler": None}
ANCESTRAL = {"eta": 1.0, **NOISE}
ADAMS = {"predictor_order": 3, "corrector_order": 4}
OWN = [
    (CHURN, ("euler", "heun", "dpm_2", "heunpp2", "ddim")),
    (ANCESTRAL, ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu")),
    (ANCESTRAL, ("euler_ancestral_cfg_pp", "dpmpp_2s_ancestral_cfg_pp")),
    (ANCESTRAL, ("res_multistep_ancestral", "res_multistep_ancestral_cfg_pp")),
    (NOISE, ("res_multistep", "res_multistep_cfg_pp")),
    ({**ANCESTRAL, "r": 0.5}, ("dpmpp_sde", "dpmpp_sde_gpu")),
    ({**ANCESTRAL, "solver_type": "midpoint"}, ("dpmpp_2m_sde", "dpmpp_2m_sde_gpu")),
    ({**ANCESTRAL, "solver_type": "heun"}, ("dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu")),
    ({"ge_gamma": 2.0}, ("gradient_estimation", "gradient_estimation_cfg_pp")),
    ({"max_order": 4}, ("ipndm", "ipndm_v")),
    ({"max_order": 3, "deis_mode": "tab"}, ("deis",)),
    ({"order": 4}, ("lms",)),
    ({"noise_sampler": None}, ("ddpm",)),
    ({"noise_sampler": None, "s_noise": 1.0, "s_noise_end": None, "noise_clip_std": 0.0}, ("lcm",)),
    ({**NOISE, "noise_scaler": None, "max_stage": 3}, ("er_sde",)),
    ({**ANCESTRAL, "r": 0.5, "solver_type": "phi_1"}, ("seeds_2",)),
    ({**ANCESTRAL, "r_1": 1 / 3, "r_2": 2 / 3}, ("seeds_3",)),
    ({"solver_type": "phi_2"}, ("exp_heun_2_x0",)),
    ({**ANCESTRAL, "solver_type": "phi_2"}, ("exp_heun_2_x0_sde",)),
    ({"tau_func": None, **NOISE, **ADAMS, "use_pece": False, "simple_order_2": False}, ("sa_solver",)),
    ({"tau_func": None, **NOISE, **ADAMS, "simple_order_2": False}, ("sa_solver_pece",)),
    ({"variant": "bh1"}, ("uni_pc",)),
]
OPTIONS = {name: options for options, names in OWN for name in names}


def test_every_name_is_found():
    assert set(comfyui.SAMPLER_NAMES) == set(NAMES)
    for name in NAMES:
        assert getattr(k_diffusion, f"sample_{name}") is getattr(comfyui, f"sample_{name}")


@pytest.mark.parametrize("name", STEPPED)
def test_signatures(name):
    found = inspect.signature(getattr(k_diffusion, f"sample_{name}")).parameters
    assert list(found)[2:6] == ["sigmas", "extra_args", "callback", "disable"]
    assert {key: value.default for key, value in list(found.items())[6:]} == OPTIONS.get(name, {})
