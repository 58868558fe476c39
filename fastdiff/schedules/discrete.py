"""Variance-preserving schedules given by a value per training timestep; the network is called with its index."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import InputError
from fastdiff.schedules.schedule import Array, Schedule, check_steps, from_ratio


@dataclass(frozen=True, eq=False)
class Interpolated:
    """Between r = sigma / alpha of the timesteps 0, 1 ...; the last may be infinite: 1 / r is linear before it."""

    ratios: Array

    @property
    def _finite(self) -> Array:
        return self.ratios[np.isfinite(self.ratios)]

    def at(self, t: Array, interpolation: str) -> tuple[Array, Array]:
        known = self._finite
        index = np.arange(len(known), dtype=np.float64)
        if interpolation == "log":
            ratio = np.exp(np.interp(t, index, np.log(known)))
        else:
            ratio = np.interp(t, index, known)
        last = len(self.ratios) - 1
        if len(known) <= last:
            with np.errstate(divide="ignore"):
                ratio = np.where(t > last - 1, known[-1] / np.clip(last - t, 0.0, 1.0), ratio)
        return from_ratio("vp", ratio)

    def timestep_of(self, ratio: Array) -> Array:
        known, last = self._finite, len(self.ratios) - 1
        with np.errstate(divide="ignore"):
            t = np.interp(np.log(ratio), np.log(known), np.arange(len(known), dtype=np.float64))
        if len(known) <= last:
            t = np.where(ratio > known[-1], last - known[-1] / np.maximum(ratio, known[-1]), t)
        return t

    def time(self, t: Array) -> Array:
        return (t + 1.0) / len(self.ratios)

    def timestep(self, s: Array) -> Array:
        return s * len(self.ratios) - 1.0

    def rates(self, t: Array) -> tuple[Array, Array]:
        known, steps = self._finite, len(self.ratios)
        slopes = np.diff(np.log(known))
        slope = slopes[np.clip(np.ceil(t).astype(int), 1, len(slopes)) - 1]
        if len(known) < steps:
            with np.errstate(divide="ignore"):
                slope = np.where(t > steps - 2, 1.0 / np.clip(steps - 1 - t, 0.0, 1.0), slope)
        g2 = 2.0 * steps * self.at(t, "log")[1] ** 2 * slope
        return -0.5 * g2, g2


def linear(steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """beta_t evenly spaced from beta_start to beta_end; alpha_t^2 = prod_{s<=t} (1 - beta_s).

    Source: Ho et al. 2020 (DDPM), section 4.
    """
    config = _betas("linear", steps, beta_start, beta_end)
    return _from_betas(np.linspace(beta_start, beta_end, steps), config)


def scaled_linear(steps: int = 1000, *, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """sqrt(beta_t) evenly spaced from sqrt(beta_start) to sqrt(beta_end).

    Source: Rombach et al. 2022 (latent diffusion), the released configuration.
    """
    config = _betas("scaled_linear", steps, beta_start, beta_end)
    return _from_betas(np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), steps) ** 2, config)


def sigmoid(steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """beta_t = beta_start + (beta_end - beta_start) / (1 + exp(-u)), u evenly spaced from -6 to 6.

    Source: Xu et al. 2022 (GeoDiff), the released configuration.
    """
    config = _betas("sigmoid", steps, beta_start, beta_end)
    return _from_betas(beta_start + (beta_end - beta_start) / (1.0 + np.exp(-np.linspace(-6.0, 6.0, steps))), config)


def cosine(steps: int = 1000, *, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """beta_t = min(1 - f((t+1)/steps) / f(t/steps), max_beta), f(u) = cos(pi/2 (u + offset) / (1 + offset))^2.

    Source: Nichol and Dhariwal 2021, equation 17.
    """
    check_steps(steps)
    _check_fractions(offset=offset, max_beta=max_beta)
    f = np.cos((np.linspace(0.0, 1.0, steps + 1) + offset) / (1.0 + offset) * (math.pi / 2)) ** 2
    config = {"name": "cosine", "steps": steps, "offset": offset, "max_beta": max_beta}
    return _from_betas(np.minimum(1.0 - f[1:] / f[:-1], max_beta), config)


def laplace(steps: int = 1000, *, max_beta: float = 0.999) -> Schedule:
    """beta_t = min(1 - f((t+1)/steps) / f(t/steps), max_beta), f(u) = sqrt(snr / (1 + snr)),
    ln(snr) = sign(u - 1/2) / 2 ln(1 - 2 |u - 1/2| + 1e-6).

    Source: Hang et al. 2024, "Improved Noise Schedule for Diffusion Training", table 1 with b = 1/2, as diffusers has
    it: f takes the place of alpha^2.
    """
    check_steps(steps)
    _check_fractions(max_beta=max_beta)
    u = np.linspace(0.0, 1.0, steps + 1) - 0.5
    log_snr = np.copysign(0.5, u) * np.log(1.0 - 2.0 * np.abs(u) + 1e-6)
    f = 1.0 / np.sqrt(1.0 + np.exp(-log_snr))
    config = {"name": "laplace", "steps": steps, "max_beta": max_beta}
    return _from_betas(np.minimum(1.0 - f[1:] / f[:-1], max_beta), config)


def custom(alphas_cumprod: npt.ArrayLike) -> Schedule:
    """A VP schedule from its own alpha_t^2, one per training timestep, falling within (0, 1); the last may be 0."""
    try:
        a = np.array(alphas_cumprod, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"alphas_cumprod: expected falling numbers, got {alphas_cumprod!r}") from None
    if a.ndim != 1 or len(a) < 2 or not (np.all(a[:-1] > 0) and a[-1] >= 0 and a[0] < 1 and np.all(np.diff(a) < 0)):
        raise InputError("alphas_cumprod: expected at least two falling values between 0 and 1, got something else")
    return _discrete(np.sqrt(a), np.sqrt(1.0 - a), {"name": "custom", "alphas_cumprod": a.tolist()})


def zero_terminal_snr(schedule: Schedule) -> Schedule:
    """alpha'_t = (alpha_t - alpha_T) alpha_0 / (alpha_0 - alpha_T): the first stays, and the last keeps no signal.

    schedule    a discrete VP schedule
    Errors: InputError for any other.
    Source: Lin et al. 2024, "Common Diffusion Noise Schedules and Sample Steps Are Flawed", algorithm 1.
    """
    if not isinstance(schedule, Schedule) or schedule.kind != "vp" or schedule.continuous:
        name = schedule.name if isinstance(schedule, Schedule) else schedule
        raise InputError(f"zero_terminal_snr: expected a discrete VP schedule, got {name!r}")
    a, first, last = schedule.alphas, schedule.alphas[0], schedule.alphas[-1]
    alphas = (a - last) * (first / (first - last))
    # 1 - alpha'^2 as a sum of terms that do not cancel where alpha is near 1.
    moved = last * (first - a) / (first - last)
    sigmas = np.sqrt(schedule.sigmas**2 + moved * (a + alphas))
    return _discrete(alphas, sigmas, {"name": "zero_terminal_snr", "schedule": schedule.to_config()})


def _betas(name: str, steps: int, beta_start: float, beta_end: float) -> dict[str, Any]:
    check_steps(steps)
    _check_fractions(beta_start=beta_start, beta_end=beta_end)
    return {"name": name, "steps": steps, "beta_start": beta_start, "beta_end": beta_end}


def _check_fractions(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < 1.0:
            raise InputError(f"{name}: expected a number between 0 and 1, got {value!r}")


def _from_betas(betas: Array, config: Mapping[str, Any]) -> Schedule:
    # Sums of logarithms keep 1 - alpha^2 accurate at the clean end, where alpha^2 is close to 1.
    log_alpha2 = np.cumsum(np.log1p(-betas))
    return _discrete(np.exp(0.5 * log_alpha2), np.sqrt(-np.expm1(log_alpha2)), config)


def _discrete(alphas: Array, sigmas: Array, config: Mapping[str, Any]) -> Schedule:
    with np.errstate(divide="ignore"):
        ratios = sigmas / alphas
    timesteps = np.arange(len(alphas), dtype=np.float64)
    return Schedule("vp", alphas, sigmas, timesteps, config, Interpolated(ratios), continuous=False)
