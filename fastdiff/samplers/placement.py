"""Where each spacing puts its points: one function per family, and which options it reads."""

from collections.abc import Callable

import numpy as np

from fastdiff.errors import InputError
from fastdiff.samplers import spacings
from fastdiff.samplers.grid_types import Grid, GridOptions
from fastdiff.schedules import Array, Schedule, shift_time

LARGEST_SIGMA = 80.0
ORIGINAL_STEPS = 50


def _finish(schedule: Schedule, t: Array, alphas: Array, sigmas: Array, end: tuple[float, float]) -> Grid:
    """The points and the final one, which is (alpha, sigma)."""
    last = schedule.timestep_of(end[1] / end[0])
    return Grid(np.append(t, last), np.append(alphas, end[0]), np.append(sigmas, end[1]))


def _even_timesteps(schedule: Schedule, steps: int, options: GridOptions, spacing: str, final: str) -> Grid:
    length = schedule.steps
    offset = options.steps_offset or 0
    whole = options.integer is not False and not schedule.continuous
    endpoint = _endpoint(options, final, spacing == "linspace" or (spacing == "leading" and offset == 0))
    count = steps if endpoint else steps + 1
    low, high = options.sigma_min, options.sigma_max
    if spacing == "leading":
        k = np.arange(count)[::-1] * float(length // count) + offset
    elif spacing == "linspace":
        first = length - 1.0 if high is None else schedule.index_of(_level("sigma_max", high))
        last = 0.0 if low is None else schedule.index_of(_level("sigma_min", low))
        k = np.linspace(first, last, count)
    else:
        k = length * np.arange(steps, 0, -1) / steps
    k = np.round(k) if whole else k
    k = k - 1.0 if spacing == "trailing" else k[:steps]
    t = schedule.timestep_at(k)
    alphas, sigmas = schedule.at(t, interpolation=options.interpolation or "log")
    end = (1.0, 0.0)
    if final == "schedule":
        end = (schedule.alphas[0], schedule.sigmas[0]) if low is None else _pair(schedule, low)
    return _finish(schedule, t, alphas, sigmas, end)


def _even_levels(schedule: Schedule, steps: int, options: GridOptions, spacing: str, final: str) -> Grid:
    """Points even in a function of the noise level: sigma / alpha, for flow schedules t."""
    flow = schedule.kind == "flow"
    high, low = _range(schedule, options)
    ramp = np.linspace(0.0, 1.0, steps if _endpoint(options, final, True) else steps + 1)
    if flow:
        high, low = _shifted(schedule, options, np.array([high, low]))
    if spacing == "karras":
        levels = spacings.power(high, low, ramp, _level("rho", options.rho, 7.0))
    elif spacing == "beta":
        a, b = _level("beta_a", options.beta_a, 0.6), _level("beta_b", options.beta_b, 0.6)
        levels = spacings.beta(high, low, ramp, a, b)
    else:
        levels = spacings.geometric(high, low, ramp, _level("rho", options.rho, 1.0))
    return _at_levels(schedule, options, levels[:steps], 0.0 if final == "zero" else float(levels[-1]))


def _even_flow(schedule: Schedule, steps: int, options: GridOptions, spacing: str, final: str) -> Grid:
    """Points even in u."""
    high, low = _range(schedule, options)
    if spacing == "flow":
        u = 1.0 - np.arange(steps) / steps
    else:
        u = high + (low - high) * np.linspace(0.0, 1.0, steps if _endpoint(options, final, True) else steps + 1)
    levels = _shifted(schedule, options, u)
    end = 0.0
    if final == "schedule":
        end = float(levels[-1]) if len(levels) > steps else float(shift_time(low, _shift(schedule, options)))
    return _at_levels(schedule, options, levels[:steps], end)


def _published(schedule: Schedule, steps: int, options: GridOptions, spacing: str, final: str) -> Grid:
    if options.ays_model is None:
        raise InputError(f"ays_model: align_your_steps needs one of {', '.join(spacings.ALIGN_YOUR_STEPS)}, got None")
    levels = spacings.align_your_steps(options.ays_model, steps + 1)
    return _at_levels(schedule, options, levels[:steps], 0.0 if final == "zero" else float(levels[-1]))


def _distilled(schedule: Schedule, steps: int, options: GridOptions, spacing: str, final: str) -> Grid:
    length, original = schedule.steps, options.original_steps
    if original is None:
        original = min(ORIGINAL_STEPS, length)
    if isinstance(original, bool) or not isinstance(original, int) or not 1 <= original <= length:
        raise InputError(f"original_steps: expected a whole number from 1 to {length}, got {original!r}")
    available = original if options.strength is None else strength_steps(original, options.strength)
    if steps > available:
        raise InputError(
            f"steps: spacing='lcm' picks them from {available} timesteps (original_steps={original}, with the "
            f"strength), got {steps}; take fewer steps, more original_steps, or another spacing"
        )
    k = (length // original) * (available - np.arange(steps) * available // steps) - 1.0
    if schedule.kind == "flow":
        levels = _shifted(schedule, options, (k + 1.0) / length)
        return _at_levels(schedule, options, levels, 0.0 if final == "zero" else float(schedule.sigmas[0]))
    t = schedule.timestep_at(k)
    alphas, sigmas = schedule.at(t)
    end = (1.0, 0.0) if final == "zero" else (schedule.alphas[0], schedule.sigmas[0])
    return _finish(schedule, t, alphas, sigmas, end)


def strength_steps(steps: int, strength: float) -> int:
    """int(steps * strength); InputError where that leaves none."""
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0.0 < strength <= 1.0:
        raise InputError(f"strength: expected a number above 0 and at most 1, got {strength!r}")
    kept = int(steps * strength)
    if kept < 1:
        raise InputError(f"strength: {strength:g} of {steps} steps leaves none; take more steps or a larger strength")
    return kept


def _given_timesteps(schedule: Schedule, steps: int, options: GridOptions, spacing: str, final: str) -> Grid:
    t = np.asarray(options.timesteps, dtype=np.float64)
    alphas, sigmas = schedule.at(t, interpolation=options.interpolation or "log")
    if final == "last":
        return Grid(t, alphas, sigmas)
    end = (1.0, 0.0) if final == "zero" else (schedule.alphas[0], schedule.sigmas[0])
    return _finish(schedule, t, alphas, sigmas, end)


def _given_levels(schedule: Schedule, steps: int, options: GridOptions, spacing: str, final: str) -> Grid:
    levels = np.asarray(options.sigmas, dtype=np.float64)
    most = {"flow": 1.0, "ve": np.finfo(np.float64).max}.get(schedule.kind, np.inf)
    if levels[0] > most or levels[-1] < 0.0:
        raise InputError(f"sigmas: expected levels from 0 to {most:g} for a {schedule.kind} schedule, got {levels}")
    if options.shift is not None:
        levels = shift_time(levels, _shift(schedule, options))
    end = float(levels[-1]) if len(levels) > steps else 0.0
    if final == "schedule":
        end = float((schedule.sigmas if schedule.kind == "flow" else schedule.noise_ratios)[0])
    return _at_levels(schedule, options, levels[:steps], end)


def _at_levels(schedule: Schedule, options: GridOptions, levels: Array, end: float) -> Grid:
    levels = np.append(levels, end)
    if schedule.kind == "flow":
        alphas, sigmas, timesteps = 1.0 - levels, levels, schedule.steps * levels
    else:
        alphas, sigmas = schedule.from_ratio(levels)
        timesteps = schedule.timestep_of(levels)
    return Grid(np.round(timesteps) if options.integer else timesteps, alphas, sigmas)


def _pair(schedule: Schedule, ratio: float) -> tuple[float, float]:
    alpha, sigma = schedule.from_ratio(ratio)
    return float(alpha), float(sigma)


def _range(schedule: Schedule, options: GridOptions) -> tuple[float, float]:
    """(high, low): sigma / alpha, for flow schedules u."""
    flow = schedule.kind == "flow"
    ratios = np.array([1.0 / schedule.steps, 1.0]) if flow else schedule.noise_ratios
    most = LARGEST_SIGMA if schedule.kind in ("vp", "sub_vp") else np.inf
    low = _level("sigma_min", options.sigma_min, float(ratios[0]))
    high = _level("sigma_max", options.sigma_max, min(float(ratios[-1]), most))
    if not low < high or (flow and high > 1.0):
        raise InputError(f"sigma_min, sigma_max: expected 0 < sigma_min < sigma_max, got {low:g} and {high:g}")
    return high, low


def _shift(schedule: Schedule, options: GridOptions) -> float:
    return _level("shift", options.shift, float(schedule.config["shift"]))


def _shifted(schedule: Schedule, options: GridOptions, u: Array) -> Array:
    times = shift_time(u, _shift(schedule, options))
    if options.shift_terminal is None:
        return times
    terminal = _level("shift_terminal", options.shift_terminal)
    if not terminal < 1.0:
        raise InputError(f"shift_terminal: expected a number between 0 and 1, got {terminal:g}")
    return spacings.stretch(times, terminal)


def _endpoint(options: GridOptions, final: str, reaches_end: bool) -> bool:
    if options.endpoint is not None:
        return options.endpoint
    return final == "zero" or not reaches_end


def _level(name: str, value: float | None, default: float | None = None) -> float:
    if value is None and default is not None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
        raise InputError(f"{name}: expected a positive number, got {value!r}")
    return float(value)


_Place = Callable[[Schedule, int, GridOptions, str, str], Grid]
_Spacings = dict[str, tuple[_Place, tuple[str, ...]]]
GIVEN = ("timesteps", "sigmas")
_LEVEL_OPTIONS = ("endpoint", "integer", "sigma_min", "sigma_max")
_FLOW_OPTIONS = ("shift", "shift_terminal")
_DISTILLED = ("original_steps",)
_TIMES: _Spacings = {
    "leading": (_even_timesteps, ("endpoint", "integer", "steps_offset", "interpolation")),
    "linspace": (_even_timesteps, (*_LEVEL_OPTIONS, "interpolation")),
    "trailing": (_even_timesteps, ("integer", "interpolation")),
}
_LEVELS: _Spacings = {
    "karras": (_even_levels, (*_LEVEL_OPTIONS, "rho")),
    "exponential": (_even_levels, _LEVEL_OPTIONS),
    "polyexponential": (_even_levels, (*_LEVEL_OPTIONS, "rho")),
    "beta": (_even_levels, (*_LEVEL_OPTIONS, "beta_a", "beta_b")),
}
_SIGNAL: _Spacings = {
    **_TIMES,
    **_LEVELS,
    "logsnr": (_even_levels, _LEVEL_OPTIONS),
    "lcm": (_distilled, _DISTILLED),
    "timesteps": (_given_timesteps, ("timesteps", "interpolation")),
    "sigmas": (_given_levels, ("sigmas", "integer")),
}
_PUBLISHED: _Spacings = {"align_your_steps": (_published, ("ays_model", "integer"))}
SPACINGS: dict[str, _Spacings] = {
    "vp": {**_SIGNAL, **_PUBLISHED},
    "ve": {**_SIGNAL, **_PUBLISHED},
    "sub_vp": _SIGNAL,
    "flow": {
        "flow": (_even_flow, _FLOW_OPTIONS),
        "linspace": (_even_flow, (*_LEVEL_OPTIONS, *_FLOW_OPTIONS)),
        **{name: (place, (*used, *_FLOW_OPTIONS)) for name, (place, used) in _LEVELS.items()},
        "lcm": (_distilled, (*_DISTILLED, *_FLOW_OPTIONS)),
        "timesteps": (_given_timesteps, ("timesteps",)),
        "sigmas": (_given_levels, ("sigmas", "integer", "shift")),
    },
}
