"""What a method solves, and the points at which it calls the network."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from fastdiff import parameterization
from fastdiff.errors import InputError
from fastdiff.parameterization import Linear
from fastdiff.samplers.grid import Grid
from fastdiff.schedules import Schedule


@dataclass(frozen=True)
class Threshold:
    """Dynamic thresholding: D is bounded by the quantile of its own |D|, which lies between the clip and `maximum`,
    and then divided by it (times the clip). Saharia et al. 2022, section 2.3."""

    percentile: float
    maximum: float = math.inf


@dataclass(frozen=True, eq=False)
class Point:
    """x = alpha x_0 + sigma epsilon, held as the state x / scale; the network is called with `timestep` there.

    scale is 1, or alpha in the space of Karras et al. 2022, where the state is y = x_0 + ratio epsilon.
    """

    schedule: Schedule
    prediction: str
    alpha: float
    sigma: float
    timestep: float
    scale: float

    @property
    def ratio(self) -> float:
        """sigma / alpha; infinite where no signal is left."""
        return self.sigma / self.alpha if self.alpha else math.inf

    @property
    def level(self) -> tuple[float, float]:
        """(signal, noise): the state is signal * x_0 + noise * epsilon."""
        return self.alpha / self.scale, self.sigma / self.scale

    @property
    def input_scale(self) -> float:
        """What the state is multiplied by for the network."""
        return self.scale * parameterization.input_scale(
            self.prediction, self.alpha, self.sigma, self.schedule.sigma_data
        )

    @property
    def init_scale(self) -> float:
        """Standard deviation of the pure noise to start from here: 1 in x where the schedule keeps the variance."""
        return (1.0 if self.schedule.kind == "vp" else self.sigma) / self.scale

    @cached_property
    def data(self) -> Linear:
        """D, the data prediction, from the state and the model output."""
        return parameterization.data(
            self.prediction,
            self.alpha,
            self.sigma,
            state_scale=self.scale,
            sigma_data=self.schedule.sigma_data,
        )

    @cached_property
    def noise(self) -> Linear:
        """epsilon from the state and the model output."""
        return parameterization.noise(
            self.prediction,
            self.alpha,
            self.sigma,
            state_scale=self.scale,
            sigma_data=self.schedule.sigma_data,
        )


class End(NamedTuple):
    """Where a step ends.

    added    f of x = a x' + sqrt(f) z, the forward process from there to the start of the step; None: of the levels
    shrink   a, likewise
    """

    timestep: float
    alpha: float
    sigma: float
    added: float | None = None
    shrink: float | None = None


@dataclass(frozen=True, eq=False)
class Interval:
    """A step of a one-step method, from one point to another."""

    start: Point
    end: Point
    known_added: float | None = None
    known_shrink: float | None = None

    @property
    def shrink(self) -> float:
        """a = alpha/alpha': what the forward process multiplies by from the end to the start."""
        return self.start.alpha / self.end.alpha if self.known_shrink is None else self.known_shrink

    @property
    def added(self) -> float:
        """f = sigma^2 - (a sigma')^2: the variance that the forward process adds from the end to the start."""
        if self.known_added is not None:
            return self.known_added
        return max(self.start.sigma**2 - (self.start.alpha / self.end.alpha * self.end.sigma) ** 2, 0.0)


@dataclass(frozen=True)
class Problem:
    """What every method starts from: the grid, what the network predicts, and the bounds of the data prediction.

    ends    for one-step methods: where each step ends, if not where the next one begins
    """

    schedule: Schedule
    grid: Grid
    prediction: str
    clip: float | None
    threshold: Threshold | None = None
    ends: Sequence[End] | None = None

    @property
    def bounded(self) -> bool:
        """Whether D is more than a linear function of the state and the model output."""
        return self.clip is not None or self.threshold is not None

    def points(self, *, scaled: bool = False) -> list[Point]:
        """The steps + 1 points of the grid."""
        grid = self.grid
        values = zip(grid.alphas.tolist(), grid.sigmas.tolist(), grid.timesteps.tolist(), strict=True)
        return [self._point(alpha, sigma, timestep, scaled) for alpha, sigma, timestep in values]

    def intervals(self) -> list[Interval]:
        """The steps of the grid."""
        points = self.points()
        if self.ends is None:
            return [Interval(start, end) for start, end in pairwise(points)]
        return [
            Interval(start, self._point(end.alpha, end.sigma, end.timestep, scaled=False), end.added, end.shrink)
            for start, end in zip(points, self.ends, strict=False)
        ]

    def at_ratio(self, ratio: float, *, scaled: bool = False) -> Point:
        """The point of the schedule where sigma / alpha is `ratio`."""
        alpha, sigma = (float(value) for value in self.schedule.from_ratio(ratio))
        return self._point(alpha, sigma, float(self.schedule.timestep_of(ratio)), scaled)

    def at_timestep(self, timestep: float, *, scaled: bool = False) -> Point:
        """The point of the schedule where the network is called with `timestep`."""
        alpha, sigma = (float(value) for value in self.schedule.at(timestep))
        return self._point(alpha, sigma, timestep, scaled)

    def _point(self, alpha: float, sigma: float, timestep: float, scaled: bool) -> Point:
        if scaled and alpha == 0.0:
            raise InputError(
                f"schedule: {self.schedule.name!r} keeps no signal at its first timestep, and the method works in "
                "x / alpha; use another method (ddim, dpmpp_2m) or a smaller sigma_max"
            )
        return Point(self.schedule, self.prediction, alpha, sigma, timestep, alpha if scaled else 1.0)
