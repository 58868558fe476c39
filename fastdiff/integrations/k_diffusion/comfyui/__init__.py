"""The samplers and schedules that ComfyUI lists, by its names and signatures, and its ways with their arguments.

`getattr(comfyui, "sample_" + name)` is there for each of SAMPLER_NAMES, `SCHEDULERS[name]` for each of SCHEDULER_NAMES.
Where a name is k-diffusion's too and another than ComfyUI calls, it is k-diffusion's own.
"""

from fastdiff.integrations.k_diffusion.comfyui.guided import (
    sample_dpmpp_2m_cfg_pp,
    sample_dpmpp_2s_ancestral_cfg_pp,
    sample_euler_ancestral_cfg_pp,
    sample_euler_cfg_pp,
    sample_gradient_estimation_cfg_pp,
    sample_res_multistep_ancestral_cfg_pp,
    sample_res_multistep_cfg_pp,
)
from fastdiff.integrations.k_diffusion.comfyui.samplers import (
    sample_ddpm,
    sample_deis,
    sample_er_sde,
    sample_exp_heun_2_x0,
    sample_exp_heun_2_x0_sde,
    sample_gradient_estimation,
    sample_ipndm,
    sample_ipndm_v,
    sample_lcm,
    sample_res_multistep,
    sample_res_multistep_ancestral,
    sample_sa_solver,
    sample_sa_solver_pece,
    sample_seeds_2,
    sample_seeds_3,
)
from fastdiff.integrations.k_diffusion.comfyui.sde import (
    sample_dpmpp_2m_sde,
    sample_dpmpp_2m_sde_gpu,
    sample_dpmpp_2m_sde_heun,
    sample_dpmpp_2m_sde_heun_gpu,
    sample_dpmpp_3m_sde,
    sample_dpmpp_3m_sde_gpu,
    sample_dpmpp_sde,
    sample_dpmpp_sde_gpu,
)
from fastdiff.integrations.k_diffusion.comfyui.shared import (
    sample_ddim,
    sample_dpm_2,
    sample_dpm_2_ancestral,
    sample_dpm_adaptive,
    sample_dpm_fast,
    sample_dpmpp_2m,
    sample_dpmpp_2s_ancestral,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_heunpp2,
    sample_lms,
)
from fastdiff.integrations.k_diffusion.comfyui.sigmas import (
    SCHEDULER_NAMES,
    SCHEDULERS,
    beta_scheduler,
    calculate_sigmas,
    ddim_scheduler,
    kl_optimal_scheduler,
    linear_quadratic_schedule,
    normal_scheduler,
    simple_scheduler,
)
from fastdiff.integrations.k_diffusion.comfyui.unipc import sample_uni_pc, sample_uni_pc_bh2

SAMPLERS = {
    name.removeprefix("sample_"): function for name, function in globals().items() if name.startswith("sample_")
}
SAMPLER_NAMES = tuple(sorted(SAMPLERS))

__all__ = [
    "SAMPLERS",
    "SAMPLER_NAMES",
    "SCHEDULERS",
    "SCHEDULER_NAMES",
    "beta_scheduler",
    "calculate_sigmas",
    "ddim_scheduler",
    "kl_optimal_scheduler",
    "linear_quadratic_schedule",
    "normal_scheduler",
    "simple_scheduler",
    *(f"sample_{name}" for name in SAMPLER_NAMES),
]
