"""How noise levels are spaced between two ends: functions of a ramp that rises from 0 at the noisiest to 1."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from fastdiff.errors import InputError
from fastdiff.schedules import Array

ALIGN_YOUR_STEPS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029),
        "sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029),
        "svd": (700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002),
    }
)
"""sigma / alpha of the optimised ten steps. Sabour et al. 2024, "Align Your Steps", table 3."""


def power(high: float, low: float, ramp: Array, rho: float) -> Array:
    """(high^(1/rho) + ramp (low^(1/rho) - high^(1/rho)))^rho. Karras et al. 2022, equation 5."""
    first, last = high ** (1.0 / rho), low ** (1.0 / rho)
    return (first + ramp * (last - first)) ** rho


def geometric(high: float, low: float, ramp: Array, rho: float = 1.0) -> Array:
    """low (high / low)^((1 - ramp)^rho): even in the logarithm where rho = 1 (k-diffusion)."""
    return low * (high / low) ** ((1.0 - ramp) ** rho)


def beta(high: float, low: float, ramp: Array, a: float, b: float) -> Array:
    """low + (high - low) q, q the (1 - ramp)-quantile of the beta distribution with parameters a and b.

    Lee et al. 2024, "Beta Sampling is All You Need", has the quantiles for the time; on the level they are diffusers'.
    """
    try:
        from scipy.special import betaincinv
    except ImportError as error:
        raise InputError("spacing: 'beta' needs SciPy; pip install scipy") from error
    return low + (high - low) * betaincinv(a, b, 1.0 - ramp)


def align_your_steps(model: str, points: int) -> Array:
    """`points` levels, linear in log(sigma / alpha) between the published ones."""
    if not isinstance(model, str) or model not in ALIGN_YOUR_STEPS:
        raise InputError(f"ays_model: expected one of {', '.join(ALIGN_YOUR_STEPS)}, got {model!r}")
    known = np.array(ALIGN_YOUR_STEPS[model])
    even = np.linspace(0.0, 1.0, len(known))
    return np.exp(np.interp(np.linspace(0.0, 1.0, points), even, np.log(known)))


def stretch(times: Array, terminal: float) -> Array:
    """1 - (1 - t) (1 - terminal) / (1 - t_last): the last flow time becomes `terminal`, t = 1 stays.

    HaCohen et al. 2024 (LTX-Video), the released configuration. A single time of 1 has nothing to stretch.
    """
    rest = 1.0 - times
    return times if rest[-1] == 0.0 else 1.0 - rest * ((1.0 - terminal) / rest[-1])
