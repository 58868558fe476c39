"""k_diffusion.sampling: its functions by name, signature, draws of noise and numbers.

A model is called as model(x, sigma * ones(N), **extra_args) and gives the data prediction D. x is (N, ...), of any
floating dtype and on any device; sigmas (steps + 1,) fall to the end of the run, which may be 0. The rows are those of
`fastdiff.samplers`, where the formulas are derived and the papers stand; one fused operator applies each.

Below, s and s' are the levels at which a step begins and ends, d = (x - D)/s. What all samplers take:

    extra_args      keywords for the model
    callback        told {'x', 'i', 'sigma', 'sigma_hat', 'denoised'} at each step, once D is known
    disable         whether there is no progress bar
    s_churn, s_tmin, s_tmax   before a step from s_tmin <= s <= s_tmax, fresh noise raises s to (1 + gamma) s with
                    gamma = min(s_churn / steps, sqrt(2) - 1)
    s_noise         what fresh noise is multiplied by
    eta             how much of a step fresh noise makes up for: 0 for none
    noise_sampler   (sigma, sigma_next) -> standard normal noise; None: PyTorch's own generator, or where it is said a
                    Brownian path over sigma (torchsde)

Errors: InputError for arguments that are none of this.
"""

from fastdiff.integrations.k_diffusion.adaptive import (
    log_likelihood,
    sample_dpm_adaptive,
)
from fastdiff.integrations.k_diffusion.dpm import (
    sample_dpm_fast,
    sample_dpmpp_2m,
    sample_dpmpp_2m_sde,
    sample_dpmpp_2s_ancestral,
    sample_dpmpp_3m_sde,
    sample_dpmpp_sde,
)
from fastdiff.integrations.k_diffusion.karras import (
    linear_multistep_coeff,
    sample_dpm_2,
    sample_dpm_2_ancestral,
    sample_euler,
    sample_euler_ancestral,
    sample_heun,
    sample_lms,
)
from fastdiff.integrations.k_diffusion.noise import (
    BatchedBrownianTree,
    BrownianTreeNoiseSampler,
    default_noise_sampler,
)
from fastdiff.integrations.k_diffusion.sigmas import (
    append_zero,
    get_ancestral_step,
    get_sigmas_exponential,
    get_sigmas_karras,
    get_sigmas_polyexponential,
    get_sigmas_vp,
    to_d,
)

__all__ = [
    "BatchedBrownianTree",
    "BrownianTreeNoiseSampler",
    "append_zero",
    "default_noise_sampler",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "linear_multistep_coeff",
    "log_likelihood",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpm_adaptive",
    "sample_dpm_fast",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "to_d",
]
