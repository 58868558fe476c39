"""The points a sampler visits, from the noisiest to the cleanest, in float64."""

import numpy as np

from fastdiff.errors import InputError
from fastdiff.samplers.grid_types import FINAL_SIGMAS, GRID_OPTIONS, Grid, GridOptions, options_from
from fastdiff.samplers.placement import GIVEN, SPACINGS, strength_steps
from fastdiff.schedules import INTERPOLATIONS, Schedule

__all__ = ["GRID_OPTIONS", "Grid", "GridOptions", "build", "options_from"]


def build(schedule: Schedule, steps: int | None, options: GridOptions) -> Grid:
    """The grid of `steps` steps, of which `strength` keeps the last; steps may be None with `timesteps` or `sigmas`.

    Errors: InputError if the options do not fit the schedule or leave a step of no length.
    """
    _check_types(options)
    spacing = _spacing(schedule, options)
    place, used = SPACINGS[schedule.kind][spacing]
    _check_used(spacing, used, options, schedule)
    final = options.final_sigma
    if final is None:
        final = "schedule" if spacing == "logsnr" else "zero"
    if final not in FINAL_SIGMAS or (final == "last" and spacing not in GIVEN):
        finals = FINAL_SIGMAS if spacing in GIVEN else FINAL_SIGMAS[:-1]
        raise InputError(f"final_sigma: expected one of {', '.join(finals)}, got {options.final_sigma!r}")
    if spacing in GIVEN:
        count = _check_given(spacing, steps, final, options)
    elif isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= schedule.steps:
        raise InputError(f"steps: expected a whole number from 1 to {schedule.steps}, got {steps!r}")
    else:
        count = steps
    grid = place(schedule, count, options, spacing, final)
    _check_points(grid, schedule, options, spacing, final)
    if options.strength is None or spacing == "lcm":
        return grid
    return grid.tail(strength_steps(grid.steps, options.strength))


def _check_types(options: GridOptions) -> None:
    """InputError for an option of another type, whatever the spacing."""
    for name in ("endpoint", "integer"):
        value = getattr(options, name)
        if value is not None and not isinstance(value, bool):
            raise InputError(f"{name}: expected True, False or None, got {value!r}")
    offset = options.steps_offset
    if offset is not None and (isinstance(offset, bool) or not isinstance(offset, int) or offset < 0):
        raise InputError(f"steps_offset: expected a whole number of at least 0, got {offset!r}")
    if options.interpolation is not None and options.interpolation not in INTERPOLATIONS:
        raise InputError(f"interpolation: expected 'log' or 'linear', got {options.interpolation!r}")


def _spacing(schedule: Schedule, options: GridOptions) -> str:
    """What places the points: a spacing, or the name of the option that gives them."""
    given = [name for name in GIVEN if getattr(options, name) is not None]
    if len(given) > 1 or (given and options.spacing is not None):
        raise InputError("spacing, timesteps, sigmas: expected one of the three, got more; leave the others out")
    if given:
        return given[0]
    spacing = options.spacing
    if spacing is None:
        spacing = {"flow": "flow", "ve": "karras"}.get(schedule.kind, "trailing")
    known = [name for name in SPACINGS[schedule.kind] if name not in GIVEN]
    if spacing not in known:
        raise InputError(f"spacing: expected one of {', '.join(known)} for a {schedule.kind} schedule, got {spacing!r}")
    return spacing


def _check_used(spacing: str, used: tuple[str, ...], options: GridOptions, schedule: Schedule) -> None:
    by = f"{spacing}=" if spacing in GIVEN else f"spacing={spacing!r}"
    for name in GRID_OPTIONS:
        if name not in ("spacing", "final_sigma", "strength", *used) and getattr(options, name) is not None:
            raise InputError(f"{name}: has no effect with {by} on a {schedule.kind} schedule; leave it out")
    if options.integer and schedule.continuous and schedule.kind != "flow":
        raise InputError(f"integer: the schedule {schedule.name!r} has no whole timesteps; leave it out")


def _check_given(name: str, steps: int | None, final: str, options: GridOptions) -> int:
    """The number of steps that the given points make."""
    given = getattr(options, name)
    try:
        points = np.asarray(given)
    except (TypeError, ValueError):
        raise InputError(f"{name}: expected falling numbers, got {given!r}") from None
    numbers = points.dtype.kind in "fiu" and points.ndim == 1 and len(points) > 0
    if not numbers or np.isnan(points).any() or not np.all(points[1:] < points[:-1]):
        raise InputError(f"{name}: expected falling numbers, got {given!r}")
    ends = final == "last" or (name == "sigmas" and points[-1] == 0.0)
    count = len(points) - ends
    if count < 1:
        raise InputError(f"{name}: expected a level to start from and one to end at, got {points.tolist()}")
    if steps is not None and steps != count:
        raise InputError(f"steps: {name} has {count} steps, got {steps!r}; pass steps=None or {count}")
    return count


def _check_points(grid: Grid, schedule: Schedule, options: GridOptions, spacing: str, final: str) -> None:
    low, high = min(schedule.timesteps[0], 0.0), schedule.timesteps[-1]
    if spacing in ("leading", "timesteps") and (grid.timesteps[0] > high or np.any(grid.timesteps < low)):
        name, remedy = (
            ("steps_offset", "take a smaller offset or fewer steps")
            if spacing == "leading"
            else ("timesteps", "keep them within it")
        )
        raise InputError(
            f"{name}: the timesteps start at {grid.timesteps[0]:g} and end at {grid.timesteps[-1]:g}, outside the "
            f"schedule's {low:g} to {high:g}; {remedy}"
        )
    ratios = grid.noise_ratios
    # endpoint=True on request repeats the end of the range as the final point: diffusers' "sigma_min" convention.
    inner = ratios[:-1] if options.endpoint and final == "schedule" else ratios
    # Interpolation may give the end of the range one rounding lower than the schedule itself has it.
    if not np.all(inner[1:] < inner[:-1]) or not ratios[-1] <= ratios[-2] * (1.0 + 1e-12):
        raise InputError(
            f"steps: {grid.steps} steps do not fit between the {schedule.steps} timesteps of the schedule with these "
            "grid options; take fewer steps, integer=False, or final_sigma='zero'"
        )
