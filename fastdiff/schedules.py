"""Noise schedules in float64: x_t = alpha(t) x_0 + sigma(t) epsilon.

A schedule knows alpha and sigma at its training timesteps and between them; `fastdiff.samplers.grid` picks the points a
sampler visits.
"""

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastdiff.errors import InputError

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Schedule:
    """alpha and sigma of every training timestep, float64 arrays of shape (steps,), from the cleanest to the noisiest.

    kind        "vp" (alpha^2 + sigma^2 = 1) or "flow" (alpha + sigma = 1)
    timesteps   (steps,) what the network is called with at each of them
    config      what `from_config` needs to build this schedule again
    """

    kind: str
    alphas: Array
    sigmas: Array
    timesteps: Array
    config: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"<{self.kind} schedule {self.name!r} of {self.steps} timesteps>"

    @property
    def sigma_data(self) -> float:
        return 0.5

    def from_ratio(self, ratio: npt.ArrayLike) -> tuple[Array, Array]:
        """(alpha, sigma) where sigma / alpha is `ratio`."""
        if self.kind == "flow":
            with np.errstate(divide="ignore"):
                sigma = 1.0 / (1.0 + 1.0 / np.asarray(ratio, dtype=np.float64))
            return 1.0 - sigma, sigma
        return vp_from_ratio(ratio)

    @property
    def name(self) -> str:
        return str(self.config["name"])

    @property
    def steps(self) -> int:
        """The number of training timesteps."""
        return len(self.alphas)

    @property
    def noise_ratios(self) -> Array:
        """sigma / alpha of every training timestep: the noise level in the space where the signal is not scaled."""
        with np.errstate(divide="ignore"):
            return self.sigmas / self.alphas

    def to_config(self) -> dict[str, Any]:
        """A dictionary that JSON can hold, from which `from_config` builds the same schedule."""
        return dict(self.config)

    def at(self, timestep: npt.ArrayLike, *, interpolation: str = "log") -> tuple[Array, Array]:
        """(alpha, sigma) at network timesteps, whole or between two training timesteps.

        interpolation   "log": linear in log(sigma / alpha) (k-diffusion); "linear": linear in sigma / alpha
                        (diffusers). A flow schedule is a formula and interpolates nothing.
        """
        t = np.asarray(timestep, dtype=np.float64)
        if self.kind == "flow":
            sigma = t / self.steps
            return 1.0 - sigma, sigma
        if interpolation not in ("log", "linear"):
            raise InputError(f"interpolation: expected 'log' or 'linear', got {interpolation!r}")
        if interpolation == "log":
            ratio = np.exp(np.interp(t, self.timesteps, np.log(self.noise_ratios)))
        else:
            ratio = np.interp(t, self.timesteps, self.noise_ratios)
        return vp_from_ratio(ratio)

    def timestep_of(self, ratio: npt.ArrayLike) -> Array:
        """The network timestep whose sigma / alpha is `ratio`, linear in log(ratio) between training timesteps; a
        ratio outside the schedule gives the nearest end."""
        r = np.asarray(ratio, dtype=np.float64)
        if self.kind == "flow":
            # r = inf is t = 1, where alpha is 0.
            with np.errstate(divide="ignore"):
                return self.steps / (1.0 + 1.0 / r)
        with np.errstate(divide="ignore"):
            return np.interp(np.log(r), np.log(self.noise_ratios), self.timesteps)


def vp_from_ratio(ratio: npt.ArrayLike) -> tuple[Array, Array]:
    """alpha = 1 / sqrt(1 + r^2), sigma = r alpha for r = sigma / alpha."""
    r = np.asarray(ratio, dtype=np.float64)
    alpha = 1.0 / np.hypot(1.0, r)
    return alpha, r * alpha


def linear(steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """beta_t evenly spaced from beta_start to beta_end; alpha_t^2 = prod_{s<=t} (1 - beta_s).

    Source: Ho et al. 2020 (DDPM), section 4.
    """
    _check(steps, beta_start=beta_start, beta_end=beta_end)
    config = {"name": "linear", "steps": steps, "beta_start": beta_start, "beta_end": beta_end}
    return _from_betas(np.linspace(beta_start, beta_end, steps), config)


def scaled_linear(steps: int = 1000, *, beta_start: float = 0.00085, beta_end: float = 0.012) -> Schedule:
    """sqrt(beta_t) evenly spaced from sqrt(beta_start) to sqrt(beta_end).

    Source: Rombach et al. 2022 (latent diffusion), the released configuration.
    """
    _check(steps, beta_start=beta_start, beta_end=beta_end)
    config = {"name": "scaled_linear", "steps": steps, "beta_start": beta_start, "beta_end": beta_end}
    return _from_betas(np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), steps) ** 2, config)


def cosine(steps: int = 1000, *, offset: float = 0.008, max_beta: float = 0.999) -> Schedule:
    """beta_t = min(1 - f((t+1)/steps) / f(t/steps), max_beta), f(u) = cos(pi/2 (u + offset) / (1 + offset))^2.

    Source: Nichol and Dhariwal 2021, equation 17.
    """
    _check(steps, offset=offset, max_beta=max_beta)
    f = np.cos((np.linspace(0.0, 1.0, steps + 1) + offset) / (1.0 + offset) * (math.pi / 2)) ** 2
    config = {"name": "cosine", "steps": steps, "offset": offset, "max_beta": max_beta}
    return _from_betas(np.minimum(1.0 - f[1:] / f[:-1], max_beta), config)


def flow(steps: int = 1000, *, shift: float = 1.0) -> Schedule:
    """alpha = 1 - t, sigma = t with t = shift u / (1 + (shift - 1) u), u = k/steps for k = 1..steps; the network is
    called with steps * t.

    Source: Lipman et al. 2023 and Liu et al. 2023; the shift is equation 23 of Esser et al. 2024.
    """
    _check(steps)
    if not (math.isfinite(shift) and shift > 0):
        raise InputError(f"shift: expected a positive number, got {shift!r}")
    sigmas = shift_time(np.arange(1, steps + 1) / steps, shift)
    return _frozen("flow", 1.0 - sigmas, sigmas, steps * sigmas, {"name": "flow", "steps": steps, "shift": shift})


def shift_time(u: npt.ArrayLike, shift: float) -> Array:
    """t = shift u / (1 + (shift - 1) u)."""
    u = np.asarray(u, dtype=np.float64)
    # Written so that u = 1 gives exactly 1, whatever the shift.
    return u / (u + (1.0 - u) / shift)


def custom(alphas_cumprod: npt.ArrayLike) -> Schedule:
    """A VP schedule from its own alpha_t^2, one value per training timestep, falling within (0, 1)."""
    a = np.array(alphas_cumprod, dtype=np.float64)
    if a.ndim != 1 or len(a) < 2 or not (np.all(a > 0) and np.all(a < 1) and np.all(np.diff(a) < 0)):
        raise InputError("alphas_cumprod: expected at least two falling values between 0 and 1, got something else")
    config = {"name": "custom", "alphas_cumprod": a.tolist()}
    return _frozen("vp", np.sqrt(a), np.sqrt(1.0 - a), np.arange(len(a), dtype=np.float64), config)


_BUILDERS: dict[str, Callable[..., Schedule]] = {
    "linear": linear,
    "scaled_linear": scaled_linear,
    "cosine": cosine,
    "flow": flow,
    "custom": custom,
}


def from_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a dictionary {"name": ..., "steps": ..., options}; the inverse of `Schedule.to_config`."""
    options = dict(config)
    name = options.pop("name", None)
    if name not in _BUILDERS:
        near = difflib.get_close_matches(str(name), _BUILDERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"schedule: expected a name among {sorted(_BUILDERS)}, got {name!r}{hint}")
    try:
        return _BUILDERS[name](**options)
    except TypeError as error:
        raise InputError(f"schedule {name!r}: got options {options}, which do not fit it ({error})") from None


def _check(steps: int, **inside_unit: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise InputError(f"schedule steps: expected a whole number of at least 2, got {steps!r}")
    for name, value in inside_unit.items():
        if not 0.0 < value < 1.0:
            raise InputError(f"{name}: expected a number between 0 and 1, got {value!r}")


def _from_betas(betas: Array, config: dict[str, Any]) -> Schedule:
    # Sums of logarithms keep 1 - alpha^2 accurate at the clean end, where alpha^2 is close to 1.
    log_alpha2 = np.cumsum(np.log1p(-betas))
    alphas, sigmas = np.exp(0.5 * log_alpha2), np.sqrt(-np.expm1(log_alpha2))
    return _frozen("vp", alphas, sigmas, np.arange(len(betas), dtype=np.float64), config)


def _frozen(kind: str, alphas: Array, sigmas: Array, timesteps: Array, config: dict[str, Any]) -> Schedule:
    for array in (alphas, sigmas, timesteps):
        array.flags.writeable = False
    return Schedule(kind, alphas, sigmas, timesteps, config)
