"""Schedules that are formulas of a continuous time s in [0, 1]."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import InputError
from fastdiff.schedules.schedule import Array, Curve, Schedule, check_steps, positive


@dataclass(frozen=True)
class Straight:
    """alpha = 1 - s, sigma = s; t = steps s."""

    steps: int

    def at(self, t: Array, interpolation: str) -> tuple[Array, Array]:
        sigma = t / self.steps
        return 1.0 - sigma, sigma

    def timestep_of(self, ratio: Array) -> Array:
        with np.errstate(divide="ignore"):
            return self.steps / (1.0 + 1.0 / ratio)

    def time(self, t: Array) -> Array:
        return t / self.steps

    def timestep(self, s: Array) -> Array:
        return self.steps * s

    def rates(self, t: Array) -> tuple[Array, Array]:
        s = self.time(t)
        with np.errstate(divide="ignore"):
            f = -1.0 / (1.0 - s)
        return f, -2.0 * s * f


@dataclass(frozen=True)
class Geometric:
    """alpha = 1, sigma = low (high / low)^s; t = sigma, or with a log_scale c > 0 c ln(sigma)."""

    low: float
    high: float
    log_scale: float = 0.0

    @property
    def _span(self) -> float:
        return math.log(self.high / self.low)

    def at(self, t: Array, interpolation: str) -> tuple[Array, Array]:
        return np.ones_like(t), np.exp(t / self.log_scale) if self.log_scale else t.copy()

    def timestep_of(self, ratio: Array) -> Array:
        sigma = np.where(ratio > 0.0, ratio, self.low)
        return self.log_scale * np.log(sigma) if self.log_scale else sigma

    def time(self, t: Array) -> Array:
        with np.errstate(divide="ignore"):
            log_sigma = t / self.log_scale if self.log_scale else np.log(t)
        return (log_sigma - math.log(self.low)) / self._span

    def timestep(self, s: Array) -> Array:
        # A weighted mean of the ends' logarithms, so that s = 1 gives the upper end to the last bit or two.
        log_sigma = (1.0 - s) * math.log(self.low) + s * math.log(self.high)
        return self.log_scale * log_sigma if self.log_scale else np.exp(log_sigma)

    def rates(self, t: Array) -> tuple[Array, Array]:
        return np.zeros_like(t), 2.0 * self.at(t, "log")[1] ** 2 * self._span


@dataclass(frozen=True)
class LinearBeta:
    """beta(s) = low + (high - low) s, B(s) its integral from 0; alpha = exp(-B/2); t = span s.

    sigma = sqrt(1 - exp(-B)), or with sub sigma = 1 - exp(-B).
    """

    low: float
    high: float
    span: int
    sub: bool

    def _integral(self, s: Array) -> Array:
        return s * (self.low + 0.5 * (self.high - self.low) * s)

    def at(self, t: Array, interpolation: str) -> tuple[Array, Array]:
        integral = self._integral(self.time(t))
        variance = -np.expm1(-integral)
        return np.exp(-0.5 * integral), variance if self.sub else np.sqrt(variance)

    def timestep_of(self, ratio: Array) -> Array:
        most = self._integral(np.asarray(1.0))
        if self.sub:
            # alpha - 1 / alpha = -r with alpha = exp(-B/2).
            integral = 2.0 * np.arcsinh(0.5 * ratio)
        else:
            integral = np.log1p(ratio**2)
        integral = np.minimum(integral, most)
        rise = self.high - self.low
        return self.timestep(2.0 * integral / (self.low + np.sqrt(self.low**2 + 2.0 * rise * integral)))

    def time(self, t: Array) -> Array:
        return t / self.span

    def timestep(self, s: Array) -> Array:
        return self.span * s

    def rates(self, t: Array) -> tuple[Array, Array]:
        s = self.time(t)
        beta = self.low + (self.high - self.low) * s
        return -0.5 * beta, beta * -np.expm1(-2.0 * self._integral(s)) if self.sub else beta


@dataclass(frozen=True)
class Crash:
    """sigma = sin(pi s / 2)^2, alpha = sqrt(1 - sigma^2); t = 2 / pi atan2(sigma, alpha)."""

    def at(self, t: Array, interpolation: str) -> tuple[Array, Array]:
        # The sine of the complement is exactly 0 at t = 1, which the cosine is not.
        return np.sin(0.5 * math.pi * (1.0 - t)), np.sin(0.5 * math.pi * t)

    def timestep_of(self, ratio: Array) -> Array:
        return 2.0 / math.pi * np.arctan(ratio)

    def time(self, t: Array) -> Array:
        alpha, sigma = self.at(t, "log")
        # tan^2 of pi s / 2 is sigma / (1 - sigma) = sigma (1 + sigma) / alpha^2.
        return 2.0 / math.pi * np.arctan2(np.sqrt(sigma * (1.0 + sigma)), alpha)

    def timestep(self, s: Array) -> Array:
        sine, cosine = np.sin(0.5 * math.pi * s), np.sin(0.5 * math.pi * (1.0 - s))
        return 2.0 / math.pi * np.arctan2(sine**2, cosine * np.hypot(1.0, sine))

    def rates(self, t: Array) -> tuple[Array, Array]:
        alpha, sigma = self.at(t, "log")
        # d sigma / ds = pi sin cos = pi sqrt(sigma (1 - sigma)), and 1 - sigma = alpha^2 / (1 + sigma).
        with np.errstate(divide="ignore"):
            f = -math.pi * sigma * np.sqrt(sigma / (1.0 + sigma)) / alpha
        return f, -2.0 * f


def flow(steps: int = 1000, *, shift: float = 1.0) -> Schedule:
    """alpha = 1 - t, sigma = t with t = shift u / (1 + (shift - 1) u), u = k/steps for k = 1..steps; the network is
    called with steps * t, and time is t.

    Source: Lipman et al. 2023 and Liu et al. 2023; the shift is equation 23 of Esser et al. 2024.
    """
    check_steps(steps)
    shift = positive("shift", shift)
    sigmas = shift_time(np.arange(1, steps + 1) / steps, shift)
    config = {"name": "flow", "steps": steps, "shift": shift}
    return Schedule("flow", 1.0 - sigmas, sigmas, steps * sigmas, config, Straight(steps), continuous=True)


def shift_time(u: npt.ArrayLike, shift: float) -> Array:
    """t = shift u / (1 + (shift - 1) u)."""
    u = np.asarray(u, dtype=np.float64)
    # Written so that u = 1 gives exactly 1, whatever the shift.
    return u / (u + (1.0 - u) / shift)


def dynamic_shift(
    image_tokens: float,
    *,
    base_tokens: float = 256,
    max_tokens: float = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """shift = exp(mu), mu on the line through (base_tokens, base_shift) and (max_tokens, max_shift).

    A flow schedule with that shift is the resolution-dependent one, t = e^mu / (e^mu + 1/u - 1).
    Source: Esser et al. 2024, section 5.3.2; the line is FLUX.1's, whose figures are the defaults.
    """
    base_tokens, max_tokens = positive("base_tokens", base_tokens), positive("max_tokens", max_tokens)
    for name, value in (("base_shift", base_shift), ("max_shift", max_shift)):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{name}: expected a finite number, got {value!r}")
    if not base_tokens < max_tokens:
        raise InputError(f"base_tokens, max_tokens: expected 0 < base < max, got {base_tokens!r} and {max_tokens!r}")
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + slope * (positive("image_tokens", image_tokens) - base_tokens))


def ve(steps: int = 1000, *, sigma_min: float = 0.01, sigma_max: float = 50.0) -> Schedule:
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^s, s from 0 to 1; the network is called with sigma.

    Source: Song et al. 2021, "Score-Based Generative Modeling through SDEs", appendix C (the VE SDE).
    """
    config = {"name": "ve", "steps": steps, **_ends(sigma_min, sigma_max)}
    return _sampled("ve", Geometric(sigma_min, sigma_max), steps, 0.0, config)


def edm(
    steps: int = 1000,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    sigma_data: float = 0.5,
    timestep_scale: float = 1.0,
) -> Schedule:
    """alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^s, s from 0 to 1; the network is called with
    timestep_scale * ln(sigma) / 4.

    sigma_data      the standard deviation of the data, for the prediction "edm"
    timestep_scale  1000 for the released consistency models (Song et al. 2023)
    Source: Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", table 1.
    """
    scales = {
        "sigma_data": positive("sigma_data", sigma_data),
        "timestep_scale": positive("timestep_scale", timestep_scale),
    }
    config = {"name": "edm", "steps": steps, **_ends(sigma_min, sigma_max), **scales}
    curve = Geometric(sigma_min, sigma_max, 0.25 * timestep_scale)
    return _sampled("ve", curve, steps, 0.0, config, sigma_data=sigma_data)


def vp_sde(steps: int = 1000, *, beta_min: float = 0.1, beta_max: float = 20.0, time_min: float = 1e-3) -> Schedule:
    """alpha = exp(-B/2), sigma = sqrt(1 - exp(-B)), B = beta_min s + (beta_max - beta_min) s^2 / 2, s from time_min
    to 1; the network is called with (steps - 1) s.

    Source: Song et al. 2021, "Score-Based Generative Modeling through SDEs", appendix C (the VP SDE); the network's
    argument and time_min are those of the released code.
    """
    return _linear_beta("vp_sde", "vp", steps, beta_min, beta_max, time_min)


def sub_vp_sde(steps: int = 1000, *, beta_min: float = 0.1, beta_max: float = 20.0, time_min: float = 1e-3) -> Schedule:
    """alpha = exp(-B/2), sigma = 1 - exp(-B), with B, s and the network's argument of `vp_sde`.

    Source: Song et al. 2021, "Score-Based Generative Modeling through SDEs", appendix C (the sub-VP SDE).
    """
    return _linear_beta("sub_vp_sde", "sub_vp", steps, beta_min, beta_max, time_min)


def crash(steps: int = 1000) -> Schedule:
    """sigma = sin(pi s / 2)^2, alpha = sqrt(1 - sigma^2), s from 1/steps to 1, where alpha is 0; the network is called
    with 2 / pi atan2(sigma, alpha).

    Source: Crowson's v-diffusion ("crash" schedule), which diffusers' IPNDMScheduler has as its own.
    """
    check_steps(steps)
    return _sampled("vp", Crash(), steps, 1.0 / steps, {"name": "crash", "steps": steps})


def _linear_beta(name: str, kind: str, steps: int, beta_min: float, beta_max: float, time_min: float) -> Schedule:
    check_steps(steps)
    low, high = positive("beta_min", beta_min), positive("beta_max", beta_max)
    if not low <= high:
        raise InputError(f"beta_min, beta_max: expected beta_min <= beta_max, got {low:g} and {high:g}")
    if not positive("time_min", time_min) < 1.0:
        raise InputError(f"time_min: expected a number between 0 and 1, got {time_min!r}")
    config = {"name": name, "steps": steps, "beta_min": low, "beta_max": high, "time_min": time_min}
    return _sampled(kind, LinearBeta(low, high, steps - 1, sub=kind == "sub_vp"), steps, time_min, config)


def _ends(sigma_min: float, sigma_max: float) -> dict[str, float]:
    low, high = positive("sigma_min", sigma_min), positive("sigma_max", sigma_max)
    if not low < high:
        raise InputError(f"sigma_min, sigma_max: expected sigma_min < sigma_max, got {low:g} and {high:g}")
    return {"sigma_min": low, "sigma_max": high}


def _sampled(
    kind: str, curve: Curve, steps: int, start: float, config: Mapping[str, Any], *, sigma_data: float = 0.5
) -> Schedule:
    """The schedule whose training timesteps are even in time from `start` to 1."""
    check_steps(steps)
    timesteps = curve.timestep(np.linspace(start, 1.0, steps))
    alphas, sigmas = curve.at(timesteps, "log")
    return Schedule(kind, alphas, sigmas, timesteps, config, curve, continuous=True, sigma_data=sigma_data)
