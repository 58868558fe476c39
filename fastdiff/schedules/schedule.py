"""What every noise schedule offers: alpha and sigma at any network timestep, and the way between the two."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fastdiff.errors import InputError

Array = npt.NDArray[np.float64]
KINDS = ("vp", "flow", "ve", "sub_vp")
INTERPOLATIONS = ("log", "linear")


class Curve(Protocol):
    """A schedule as functions of the network timestep t and of a time s in [0, 1], 1 the noisiest; on arrays."""

    def at(self, t: Array, interpolation: str) -> tuple[Array, Array]:
        """(alpha, sigma)."""

    def timestep_of(self, ratio: Array) -> Array:
        """t of r = sigma / alpha, which may be 0 or infinite."""

    def time(self, t: Array) -> Array:
        """s."""

    def timestep(self, s: Array) -> Array:
        """t."""

    def rates(self, t: Array) -> tuple[Array, Array]:
        """(d ln(alpha) / ds, d(sigma^2) / ds - 2 sigma^2 d ln(alpha) / ds)."""


@dataclass(frozen=True, eq=False)
class Schedule:
    """alpha and sigma of every training timestep, float64 arrays of shape (steps,), from the cleanest to the noisiest.

    kind        "vp" (alpha^2 + sigma^2 = 1), "flow" (alpha + sigma = 1), "ve" (alpha = 1) or "sub_vp"
                (sigma = 1 - alpha^2)
    timesteps   (steps,) what the network is called with at each of them
    config      what `from_config` needs to build this schedule again
    curve       the same between training timesteps
    continuous  whether it is a formula of time, for which training timesteps are only a sample of points
    sigma_data  the standard deviation of the data, which the prediction "edm" is scaled by
    """

    kind: str
    alphas: Array
    sigmas: Array
    timesteps: Array
    config: Mapping[str, Any]
    curve: Curve
    continuous: bool
    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        for array in (self.alphas, self.sigmas, self.timesteps):
            array.flags.writeable = False

    def __repr__(self) -> str:
        return f"<{self.kind} schedule {self.name!r} of {self.steps} timesteps>"

    @property
    def name(self) -> str:
        return str(self.config["name"])

    @property
    def steps(self) -> int:
        """The number of training timesteps."""
        return len(self.alphas)

    @property
    def noise_ratios(self) -> Array:
        """sigma / alpha of every training timestep: the noise level in the space where the signal is not scaled;
        infinite where no signal is left."""
        with np.errstate(divide="ignore"):
            return self.sigmas / self.alphas

    def to_config(self) -> dict[str, Any]:
        """A dictionary that JSON can hold, from which `from_config` builds the same schedule."""
        return dict(self.config)

    def at(self, timestep: npt.ArrayLike, *, interpolation: str = "log") -> tuple[Array, Array]:
        """(alpha, sigma) at network timesteps, whole or between two training timesteps.

        interpolation   "log": linear in log(sigma / alpha) (k-diffusion); "linear": linear in sigma / alpha
                        (diffusers). Before a last timestep without signal, linear in alpha / sigma instead. A
                        continuous schedule is a formula and interpolates nothing.
        """
        if interpolation not in INTERPOLATIONS:
            raise InputError(f"interpolation: expected 'log' or 'linear', got {interpolation!r}")
        return self.curve.at(np.asarray(timestep, dtype=np.float64), interpolation)

    def timestep_of(self, ratio: npt.ArrayLike) -> Array:
        """The network timestep whose sigma / alpha is `ratio`, linear in log(ratio) between training timesteps; where
        no timestep has that ratio, the nearest end."""
        return self.curve.timestep_of(np.asarray(ratio, dtype=np.float64))

    def from_ratio(self, ratio: npt.ArrayLike) -> tuple[Array, Array]:
        """(alpha, sigma) of this kind of schedule with sigma / alpha = ratio; the ratio may be infinite."""
        return from_ratio(self.kind, ratio)

    def time(self, timestep: npt.ArrayLike) -> Array:
        """The continuous time s of a network timestep: 1 at the noisiest; (t + 1) / steps for discrete schedules."""
        return self.curve.time(np.asarray(timestep, dtype=np.float64))

    def timestep_at(self, index: npt.ArrayLike) -> Array:
        """The network timestep at an index into the training timesteps, whole or, evenly in time, between two."""
        k = np.asarray(index, dtype=np.float64)
        if not self.continuous:
            return k
        start = self.time(self.timesteps[0])
        return self.curve.timestep(start + (1.0 - start) * (k / (self.steps - 1)))

    def index_of(self, ratio: npt.ArrayLike) -> Array:
        """The index, whole or between two, of the training timestep whose sigma / alpha is `ratio`."""
        t = self.timestep_of(ratio)
        if not self.continuous:
            return t
        start = self.time(self.timesteps[0])
        return (self.time(t) - start) / (1.0 - start) * (self.steps - 1)

    def drift_diffusion(self, timestep: npt.ArrayLike) -> tuple[Array, Array]:
        """(f, g2) of dx = f x ds + sqrt(g2) dw, whose solution is x_s = alpha x_0 + sigma epsilon.

        f = d ln(alpha) / ds and g2 = d(sigma^2) / ds - 2 f sigma^2 = 2 sigma^2 d ln(sigma / alpha) / ds, with s as
        `time` gives it. A discrete schedule has those of its logarithmic interpolation, at a training timestep on its
        cleaner side. Where alpha = 0 they are infinite, unless the formula says otherwise.
        Source: Song et al. 2021, "Score-Based Generative Modeling through SDEs"; Kingma et al. 2021, equation 19.
        """
        return self.curve.rates(np.asarray(timestep, dtype=np.float64))


def from_ratio(kind: str, ratio: npt.ArrayLike) -> tuple[Array, Array]:
    """(alpha, sigma) with sigma / alpha = r >= 0.

    vp: alpha = 1 / sqrt(1 + r^2); flow: alpha = 1 / (1 + r); ve: alpha = 1; sub_vp: alpha = 2 / (r + sqrt(r^2 + 4)),
    the root of alpha^2 + r alpha = 1. r = inf is (0, 1), but (1, inf) for ve.
    """
    r = np.asarray(ratio, dtype=np.float64)
    if kind == "ve":
        return np.ones_like(r), r.copy()
    if kind == "vp":
        alpha = 1.0 / np.hypot(1.0, r)
    elif kind == "flow":
        alpha = 1.0 / (1.0 + r)
    elif kind == "sub_vp":
        alpha = 2.0 / (r + np.hypot(r, 2.0))
    else:
        raise InputError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    endless = np.isinf(r)
    return alpha, np.where(endless, 1.0, np.where(endless, 0.0, r) * alpha)


def check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 2:
        raise InputError(f"schedule steps: expected a whole number of at least 2, got {steps!r}")


def positive(name: str, value: Any) -> float:
    """`value` as a float if it is positive and finite; InputError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
        raise InputError(f"{name}: expected a positive number, got {value!r}")
    return float(value)
