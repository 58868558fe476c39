"""Noise schedules in float64: x_t = alpha(t) x_0 + sigma(t) epsilon.

A schedule knows alpha and sigma at its training timesteps and between them; `fastdiff.samplers.grid` picks the points a
sampler visits.
"""

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from fastdiff.errors import InputError
from fastdiff.schedules.continuous import crash, dynamic_shift, edm, flow, shift_time, sub_vp_sde, ve, vp_sde
from fastdiff.schedules.discrete import cosine, custom, laplace, linear, scaled_linear, sigmoid, zero_terminal_snr
from fastdiff.schedules.schedule import INTERPOLATIONS, KINDS, Array, Schedule, from_ratio

__all__ = [
    "INTERPOLATIONS",
    "KINDS",
    "Array",
    "Schedule",
    "cosine",
    "crash",
    "custom",
    "dynamic_shift",
    "edm",
    "flow",
    "from_config",
    "from_ratio",
    "laplace",
    "linear",
    "scaled_linear",
    "shift_time",
    "sigmoid",
    "sub_vp_sde",
    "ve",
    "vp_sde",
    "zero_terminal_snr",
]


_BUILDERS: dict[str, Callable[..., Schedule]] = {
    build.__name__: build
    for build in (
        linear,
        scaled_linear,
        sigmoid,
        cosine,
        laplace,
        custom,
        zero_terminal_snr,
        flow,
        ve,
        edm,
        vp_sde,
        sub_vp_sde,
        crash,
    )
}


def from_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a dictionary {"name": ..., "steps": ..., options}; the inverse of `Schedule.to_config`."""
    options = dict(config)
    name = options.pop("name", None)
    if name not in _BUILDERS:
        near = difflib.get_close_matches(str(name), _BUILDERS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"schedule: expected a name among {sorted(_BUILDERS)}, got {name!r}{hint}")
    if isinstance(options.get("schedule"), Mapping):
        options["schedule"] = from_config(options["schedule"])
    try:
        return _BUILDERS[name](**options)
    except TypeError as error:
        raise InputError(f"schedule {name!r}: got options {options}, which do not fit it ({error})") from None
