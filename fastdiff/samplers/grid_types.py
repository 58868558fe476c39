"""What a grid is, and the options that it is asked for with."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from fastdiff.schedules import Array

FINAL_SIGMAS = ("zero", "schedule", "last")


@dataclass(frozen=True, kw_only=True)
class GridOptions:
    """How `build` places the points; None takes the best practice.

    A noise level is sigma / alpha, for a flow schedule t = sigma.

    spacing         Even in the training timestep (Lin et al. 2024, table 2), for a continuous schedule in its time:
                    "leading", "linspace", "trailing". Even in a function of the level: "karras" (level^(1/rho); Karras
                    et al. 2022, equation 5), "exponential" (log(level), as k-diffusion: the last evaluation is at the
                    clean end), "logsnr" (log(alpha / sigma), as DPM-Solver: the last step ends at the clean end),
                    "polyexponential" (log(level)^(1/rho); k-diffusion), "beta" (quantiles of a beta distribution; Lee
                    et al. 2024). "align_your_steps": the levels of Sabour et al. 2024, for VP and VE schedules. "lcm":
                    evenly picked from the timesteps k T/original_steps that a latent consistency model was distilled on
                    (Luo et al. 2023), k = 1, 2 ..., the first timestep being 1.
                    Flow: "flow" (u = 1 - i/steps, then the shift), "linspace" (u from 1 to 1/schedule.steps, then the
                    shift), "karras", "exponential", "polyexponential", "beta" (of t, between the shifted ends).
                    Default: "trailing" for VP and sub-VP, "flow" for flow, "karras" for VE.
    endpoint        whether the last point before the final one is the end of the range; False spreads the same range
                    over one point more and drops the last. Default: False only where the end of the range is the
                    final point itself.
    integer         whether the network is called at whole training timesteps. Default: yes where points are even in the
                    timestep. Elsewhere only what the network is told is rounded. Not for continuous schedules but flow.
    steps_offset    added to every timestep of "leading". Default 0.
    interpolation   between training timesteps: "log" (k-diffusion, default) or "linear" (diffusers).
    sigma_min, sigma_max   ends of the range, as sigma / alpha, for a flow schedule as u. Default: those of the
                    schedule; VP and sub-VP levels start at sigma / alpha = 80 at most (Karras et al. 2022, table 1;
                    above it, as in the last timesteps of the cosine schedule, no signal is left to see).
    rho             of "karras", default 7; of "polyexponential", default 1.
    beta_a, beta_b  of "beta". Default 0.6.
    ays_model       of "align_your_steps": "sd15", "sdxl" or "svd".
    original_steps  of "lcm". Default 50, or the training timesteps where they are fewer.
    shift           of a flow grid, in place of the schedule's own (`fastdiff.schedules.dynamic_shift`).
    shift_terminal  of a flow grid: stretched so that the last level before the final one is this, t = 1 staying.
    timesteps       the points themselves, as falling network timesteps, in place of a spacing.
    sigmas          the points themselves, as falling levels, with or without a final 0, in place of a spacing. A flow
                    grid takes them as t unless `shift` is given, and then as u.
    final_sigma     "zero": the last step ends at the data (default); "schedule": at the clean end of the range
                    (default of "logsnr"); "last": at the last of `timesteps` or `sigmas`.
    strength        in (0, 1]: only the last int(steps * strength) steps, for a start from a noised image; with "lcm"
                    all steps, picked from the last int(original_steps * strength) timesteps. Default 1.
    """

    spacing: str | None = None
    endpoint: bool | None = None
    integer: bool | None = None
    steps_offset: int | None = None
    interpolation: str | None = None
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    beta_a: float | None = None
    beta_b: float | None = None
    ays_model: str | None = None
    original_steps: int | None = None
    shift: float | None = None
    shift_terminal: float | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    final_sigma: str | None = None
    strength: float | None = None


GRID_OPTIONS = tuple(field.name for field in fields(GridOptions))


@dataclass(frozen=True, eq=False)
class Grid:
    """steps + 1 points; the last is where the final step ends. Arrays of shape (steps + 1,), float64.

    The noise falls from point to point; it rises in the grid of an inverse method.

    timesteps       what the network is called with at each point (the last is only called by methods that look ahead)
    alphas, sigmas  x = alpha x_0 + sigma epsilon
    skipped         steps left out before the first, by `strength`
    """

    timesteps: Array
    alphas: Array
    sigmas: Array
    skipped: int = 0

    @property
    def steps(self) -> int:
        return len(self.timesteps) - 1

    @property
    def noise_ratios(self) -> Array:
        """sigma / alpha; infinite where the schedule keeps no signal."""
        with np.errstate(divide="ignore"):
            return self.sigmas / self.alphas

    @property
    def rising(self) -> bool:
        """Whether the points go from the data to the noise."""
        return bool(self.noise_ratios[0] < self.noise_ratios[-1])

    def reversed(self) -> "Grid":
        """The same points from the last to the first."""
        return Grid(self.timesteps[::-1].copy(), self.alphas[::-1].copy(), self.sigmas[::-1].copy(), self.skipped)

    def tail(self, steps: int) -> "Grid":
        """The last `steps` steps."""
        kept = slice(self.steps - steps, None)
        return Grid(self.timesteps[kept], self.alphas[kept], self.sigmas[kept], self.skipped + self.steps - steps)


def options_from(values: dict[str, Any]) -> GridOptions:
    """Takes the grid's options out of `values`."""
    return GridOptions(**{name: values.pop(name) for name in GRID_OPTIONS if name in values})
