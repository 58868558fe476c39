"""The points a sampler visits, from the noisiest to the cleanest, in float64."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fastdiff.errors import InputError
from fastdiff.schedules import Array, Schedule, shift_time, vp_from_ratio

FINAL_SIGMAS = ("zero", "schedule")
LARGEST_SIGMA = 80.0


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """How `build` places the points; None takes the best practice.

    spacing         VP: "leading", "linspace", "trailing" (even in the timestep; Lin et al. 2024, table 2), "karras"
                    (even in (sigma/alpha)^(1/rho); Karras et al. 2022, equation 5), "exponential" (even in
                    log(sigma/alpha)). Flow: "flow" (u = 1 - i/steps, then the schedule's shift), "linspace" (u from
                    1 to 1/schedule.steps), "karras", "exponential". Default: "trailing", or "flow".
    endpoint        whether the last point before the final one is the end of the range; False spreads the same range
                    over one point more and drops the last. Default: False only where the end of the range is the
                    final point itself.
    integer         whether the network is called at whole training timesteps. Default: yes where points are even in the
                    timestep. With karras and exponential only what the network is told is rounded.
    steps_offset    added to every timestep of "leading". Default 0.
    interpolation   between training timesteps: "log" (k-diffusion, default) or "linear" (diffusers).
    sigma_min, sigma_max   ends of "karras" and "exponential", as sigma/alpha; for a flow schedule also of "linspace",
                    as u. Default: those of the schedule, but at most sigma/alpha = 80 (Karras et al. 2022, table 1;
                    above it, as in the last timesteps of the cosine schedule, no signal is left to see).
    rho             of "karras". Default 7.
    final_sigma     "zero": the last step ends at the data (default); "schedule": at the schedule's cleanest timestep.
    """

    spacing: str | None = None
    endpoint: bool | None = None
    integer: bool | None = None
    steps_offset: int | None = None
    interpolation: str | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    final_sigma: str = "zero"


GRID_OPTIONS = tuple(field.name for field in fields(GridOptions))


@dataclass(frozen=True, eq=False)
class Grid:
    """steps + 1 points; the last is where the final step ends. Arrays of shape (steps + 1,), float64.

    timesteps       what the network is called with at each point (the last is only called by methods that look ahead)
    alphas, sigmas  x = alpha x_0 + sigma epsilon
    """

    timesteps: Array
    alphas: Array
    sigmas: Array

    @property
    def steps(self) -> int:
        return len(self.timesteps) - 1

    @property
    def noise_ratios(self) -> Array:
        """sigma / alpha; infinite where the schedule keeps no signal."""
        with np.errstate(divide="ignore"):
            return self.sigmas / self.alphas


def build(schedule: Schedule, steps: int | None, options: GridOptions) -> Grid:
    """The grid of `steps` steps; InputError if the options do not fit the schedule or leave a step of no length."""
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= schedule.steps:
        raise InputError(f"steps: expected a whole number from 1 to {schedule.steps}, got {steps!r}")
    if options.final_sigma not in FINAL_SIGMAS:
        raise InputError(f"final_sigma: expected one of {', '.join(FINAL_SIGMAS)}, got {options.final_sigma!r}")
    spacing = options.spacing or ("flow" if schedule.kind == "flow" else "trailing")
    spacings = _SPACINGS[schedule.kind]
    if spacing not in spacings:
        raise InputError(
            f"spacing: expected one of {', '.join(spacings)} for a {schedule.kind} schedule, got {spacing!r}"
        )
    place, used = spacings[spacing]
    _check_used(spacing, used, options)
    grid = place(schedule, steps, options, spacing)
    _check_points(grid, steps, schedule, options)
    return grid


def _check_used(spacing: str, used: tuple[str, ...], options: GridOptions) -> None:
    for name in GRID_OPTIONS:
        if name not in ("spacing", "final_sigma", *used) and getattr(options, name) is not None:
            raise InputError(f"{name}: has no effect with spacing={spacing!r}; leave it out")


def _check_points(grid: Grid, steps: int, schedule: Schedule, options: GridOptions) -> None:
    low, high = min(schedule.timesteps[0], 0.0), schedule.timesteps[-1]
    if np.any(grid.timesteps > high) or np.any(grid.timesteps < low):
        raise InputError(
            f"steps_offset: the timesteps start at {grid.timesteps[0]:g}, outside the schedule's {low:g} to {high:g}; "
            "take a smaller offset or fewer steps"
        )
    ratios = grid.noise_ratios
    # endpoint=True on request repeats the end of the range as the final point: diffusers' "sigma_min" convention.
    inner = ratios[:-1] if options.endpoint and options.final_sigma == "schedule" else ratios
    if np.isnan(ratios).any() or np.any(np.diff(inner) >= 0) or ratios[-1] > ratios[-2]:
        raise InputError(
            f"steps: {steps} steps do not fit between the {schedule.steps} timesteps of the schedule with these grid "
            "options; take fewer steps, integer=False, or final_sigma='zero'"
        )


def _even_timesteps(schedule: Schedule, steps: int, options: GridOptions, spacing: str) -> Grid:
    length, last = schedule.steps, schedule.steps - 1
    offset = options.steps_offset or 0
    whole = options.integer is not False
    reaches_zero = spacing == "linspace" or (spacing == "leading" and offset == 0)
    endpoint = _endpoint(options, reaches_zero)
    count = steps if endpoint else steps + 1
    if spacing == "leading":
        t = np.arange(count)[::-1] * float(length // count) + offset
    elif spacing == "linspace":
        t = np.linspace(last, 0.0, count)
    else:
        t = length * np.arange(steps, 0, -1) / steps
    t = np.round(t) if whole else t
    t = t - 1.0 if spacing == "trailing" else t[:steps]
    alphas, sigmas = schedule.at(t, interpolation=options.interpolation or "log")
    end = (schedule.alphas[0], schedule.sigmas[0]) if options.final_sigma == "schedule" else (1.0, 0.0)
    return Grid(np.append(t, 0.0), np.append(alphas, end[0]), np.append(sigmas, end[1]))


def _even_levels(schedule: Schedule, steps: int, options: GridOptions, spacing: str) -> Grid:
    """Points even in a function of the noise level: sigma / alpha for VP schedules, u for flow schedules."""
    flow = schedule.kind == "flow"
    ratios = np.array([1.0 / schedule.steps, 1.0]) if flow else schedule.noise_ratios
    low = _level("sigma_min", options.sigma_min, float(ratios[0]))
    high = _level("sigma_max", options.sigma_max, min(float(ratios[-1]), LARGEST_SIGMA))
    if not low < high or (flow and high > 1.0):
        raise InputError(f"sigma_min, sigma_max: expected 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
    endpoint = _endpoint(options, True)
    ramp = np.linspace(0.0, 1.0, steps if endpoint else steps + 1)
    shift = float(schedule.config["shift"]) if flow else 1.0
    # Karras and exponential ramps run in the shifted level, the others in u.
    ends = shift_time([high, low], shift) if spacing in ("karras", "exponential") else np.array([high, low])
    if spacing == "karras":
        rho = _level("rho", options.rho, 7.0)
        first, final = ends ** (1.0 / rho)
        levels = (first + ramp * (final - first)) ** rho
    elif spacing == "exponential":
        levels = ends[0] * (ends[1] / ends[0]) ** ramp
    elif spacing == "linspace":
        levels = shift_time(ends[0] + ramp * (ends[1] - ends[0]), shift)
    else:
        levels = shift_time(1.0 - np.arange(steps) / steps, shift)
    final_level = 0.0
    if options.final_sigma == "schedule":
        final_level = float(levels[-1]) if len(levels) > steps else float(shift_time(low, shift) if flow else low)
    levels = np.append(levels[:steps], final_level)
    alphas, sigmas = (1.0 - levels, levels) if flow else vp_from_ratio(levels)
    timesteps = schedule.steps * sigmas if flow else schedule.timestep_of(levels)
    return Grid(np.round(timesteps) if options.integer else timesteps, alphas, sigmas)


def _endpoint(options: GridOptions, reaches_end: bool) -> bool:
    if options.endpoint is not None:
        return options.endpoint
    return options.final_sigma == "zero" or not reaches_end


def _level(name: str, value: float | None, default: float) -> float:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
        raise InputError(f"{name}: expected a positive number, got {value!r}")
    return float(value)


_Place = Callable[[Schedule, int, GridOptions, str], Grid]
_LEVEL_OPTIONS = ("endpoint", "integer", "sigma_min", "sigma_max")
_SPACINGS: dict[str, dict[str, tuple[_Place, tuple[str, ...]]]] = {
    "vp": {
        "leading": (_even_timesteps, ("endpoint", "integer", "steps_offset", "interpolation")),
        "linspace": (_even_timesteps, ("endpoint", "integer", "interpolation")),
        "trailing": (_even_timesteps, ("integer", "interpolation")),
        "karras": (_even_levels, (*_LEVEL_OPTIONS, "rho")),
        "exponential": (_even_levels, _LEVEL_OPTIONS),
    },
    "flow": {
        "flow": (_even_levels, ()),
        "linspace": (_even_levels, _LEVEL_OPTIONS),
        "karras": (_even_levels, (*_LEVEL_OPTIONS, "rho")),
        "exponential": (_even_levels, _LEVEL_OPTIONS),
    },
}


def options_from(values: dict[str, Any]) -> GridOptions:
    """Takes the grid's options out of `values`."""
    return GridOptions(**{name: values.pop(name) for name in GRID_OPTIONS if name in values})
