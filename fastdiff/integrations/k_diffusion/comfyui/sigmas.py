"""ComfyUI's schedules: levels (steps + 1,) on the host, falling to 0, from a model's `model_sampling`.

A `model_sampling` has `sigmas`, the levels of the training timesteps from the lowest; sigma_min and sigma_max, its
ends; `timestep(sigma)` and `sigma(timestep)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.integrations.k_diffusion.sigmas import get_sigmas_exponential, get_sigmas_karras

# Below this a model's lowest level counts as 0.
SMALLEST = 1e-5


def simple_scheduler(model_sampling: Any, steps: int) -> Tensor:
    """Levels at even distances in the training timesteps, counted from the highest, and 0."""
    known = model_sampling.sigmas
    stride = len(known) / steps
    return _levels([*(float(known[-1 - int(i * stride)]) for i in range(steps)), 0.0])


def ddim_scheduler(model_sampling: Any, steps: int) -> Tensor:
    """Levels at training timesteps 1, 1 + k, 1 + 2 k ..., k = floor(their number / steps), and 0 if 1 is not 0 itself:
    there may be one more or less than asked for."""
    known = model_sampling.sigmas
    ends_at_zero = abs(float(known[1])) <= SMALLEST
    stride = max(len(known) // (steps + ends_at_zero), 1)
    rising = [float(known[i]) for i in range(1, len(known), stride)]
    return _levels([*reversed(rising), *([] if ends_at_zero else [0.0])])


def normal_scheduler(model_sampling: Any, steps: int, sgm: bool = False, floor: bool = False) -> Tensor:
    """Levels at even timesteps from the highest level's to the lowest's, and 0 if the lowest is not 0 itself.

    sgm     the lowest level is left out
    floor   has no meaning
    """
    first, last = (model_sampling.timestep(end) for end in (model_sampling.sigma_max, model_sampling.sigma_min))
    to_zero = not sgm and abs(float(model_sampling.sigma(last))) <= SMALLEST
    count = steps + 1 if sgm or to_zero else steps
    timesteps = torch.linspace(float(first), float(last), count)[: steps if sgm else count]
    return _levels([*(float(model_sampling.sigma(t)) for t in timesteps), *([] if to_zero else [0.0])])


def sgm_uniform_scheduler(model_sampling: Any, steps: int) -> Tensor:
    """`normal_scheduler` with sgm."""
    return normal_scheduler(model_sampling, steps, sgm=True)


def beta_scheduler(model_sampling: Any, steps: int, alpha: float = 0.6, beta: float = 0.6) -> Tensor:
    """Levels at the training timesteps that are even quantiles of a beta distribution, each once, and 0.

    Source: Lee et al. 2024, "Beta Sampling is All You Need".
    """
    try:
        from scipy.stats import beta as distribution
    except ImportError as error:
        raise InputError("scheduler: 'beta' needs SciPy; pip install scipy") from error
    known = model_sampling.sigmas
    quantiles = distribution.ppf(1.0 - np.linspace(0.0, 1.0, steps, endpoint=False), alpha, beta)
    indices = np.rint(quantiles * (len(known) - 1)).astype(int).tolist()
    once = [index for i, index in enumerate(indices) if i == 0 or index != indices[i - 1]]
    return _levels([*(float(known[index]) for index in once), 0.0])


def linear_quadratic_schedule(
    model_sampling: Any, steps: int, threshold_noise: float = 0.025, linear_steps: int | None = None
) -> Tensor:
    """sigma_max (1 - f): f rises linearly to threshold_noise in linear_steps (None: half of the steps), and then as a
    parabola with the same slope there, which is 1 at the end.

    Source: Genmo 2024, Mochi; Polyak et al. 2024, "Movie Gen".
    """
    highest = torch.as_tensor(model_sampling.sigma_max).cpu()
    if steps == 1:
        return _levels([1.0, 0.0]) * highest
    straight = steps // 2 if linear_steps is None else linear_steps
    slope, rest = threshold_noise / straight, steps - straight
    bend = (straight - threshold_noise * steps) / (straight * rest**2)
    ramp = [i * slope for i in range(straight)]
    curve = [threshold_noise + slope * j + bend * j**2 for j in range(rest)]
    return _levels([1.0 - f for f in (*ramp, *curve, 1.0)]) * highest


def kl_optimal_scheduler(n: int, sigma_min: float, sigma_max: float) -> Tensor:
    """tan of n even angles from atan(sigma_max) to atan(sigma_min), and 0.

    Source: Sabour et al. 2024, "Align Your Steps", theorem 3.1.
    """
    share = torch.arange(n, dtype=torch.float32) / (n - 1)
    angles = share * math.atan(sigma_min) + (1.0 - share) * math.atan(sigma_max)
    return torch.cat([angles.tan(), torch.zeros(1)])


def _levels(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)


def _between_ends(function: Callable[..., Tensor]) -> Callable[[Any, int], Tensor]:
    def scheduler(model_sampling: Any, steps: int) -> Tensor:
        ends = float(model_sampling.sigma_min), float(model_sampling.sigma_max)
        return function(n=steps, sigma_min=ends[0], sigma_max=ends[1])

    return scheduler


SCHEDULERS: dict[str, Callable[[Any, int], Tensor]] = {
    "simple": simple_scheduler,
    "sgm_uniform": sgm_uniform_scheduler,
    "karras": _between_ends(get_sigmas_karras),
    "exponential": _between_ends(get_sigmas_exponential),
    "ddim_uniform": ddim_scheduler,
    "beta": beta_scheduler,
    "normal": normal_scheduler,
    "linear_quadratic": linear_quadratic_schedule,
    "kl_optimal": _between_ends(kl_optimal_scheduler),
}
"""By ComfyUI's names, each of (model_sampling, steps)."""
SCHEDULER_NAMES = tuple(SCHEDULERS)


def calculate_sigmas(model_sampling: Any, scheduler_name: str, steps: int) -> Tensor:
    """The levels of a schedule by its name.

    Errors: InputError for an unknown name.
    """
    if scheduler_name not in SCHEDULERS:
        raise InputError(f"scheduler_name: expected one of {', '.join(SCHEDULERS)}, got {scheduler_name!r}")
    return SCHEDULERS[scheduler_name](model_sampling, steps)
