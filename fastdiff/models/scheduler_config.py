"""What diffusers' scheduler_config.json says about a network: its noise schedule, prediction type and clipping.

Errors of each function: InputError that names the key and the value that is not supported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastdiff import schedules
from fastdiff.errors import InputError
from fastdiff.schedules import Schedule

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample", "flow_prediction": "flow"}

# Changes of the schedule that a file may ask for and that its plain reading would leave out.
_REFUSED = ("use_dynamic_shifting", "shift_terminal", "invert_sigmas", "thresholding")


def prediction(config: Mapping[str, Any]) -> str:
    """What the network predicts: "epsilon", "v", "sample" or "flow"."""
    if _is_flow(config):
        return "flow"
    name = config.get("prediction_type", "epsilon")
    if name not in _PREDICTIONS:
        raise InputError(f"scheduler: prediction_type={name!r} is not supported; pass prediction=")
    return _PREDICTIONS[name]


def clip(config: Mapping[str, Any]) -> float | None:
    """The bound of the data prediction, None for none; DDPM and DDIM clip when the file does not say."""
    clips = config.get("clip_sample", str(config.get("_class_name", "")).startswith(("DDPM", "DDIM")))
    return float(config.get("clip_sample_range", 1.0)) if clips else None


def schedule(config: Mapping[str, Any]) -> Schedule:
    """The noise that the network was trained with."""
    for key in _REFUSED:
        if config.get(key):
            raise InputError(f"scheduler: {key}={config[key]!r} is not supported; pass schedule=")
    steps = config.get("num_train_timesteps", 1000)
    if _is_flow(config):
        return schedules.flow(steps, shift=config.get("shift", config.get("flow_shift", 1.0)))
    plain = _vp(config, steps)
    return schedules.zero_terminal_snr(plain) if config.get("rescale_betas_zero_snr") else plain


def _vp(config: Mapping[str, Any], steps: int) -> Schedule:
    if config.get("trained_betas") is not None:
        betas = np.asarray(config["trained_betas"], dtype=np.float64)
        return schedules.custom(np.cumprod(1.0 - betas))
    kind = config.get("beta_schedule", "linear")
    start, end = config.get("beta_start", 1e-4), config.get("beta_end", 0.02)
    if kind == "linear":
        return schedules.linear(steps, beta_start=start, beta_end=end)
    if kind == "scaled_linear":
        return schedules.scaled_linear(steps, beta_start=start, beta_end=end)
    if kind == "squaredcos_cap_v2":
        return schedules.cosine(steps)
    if kind == "sigmoid":
        return schedules.sigmoid(steps, beta_start=start, beta_end=end)
    if kind == "laplace":
        return schedules.laplace(steps)
    raise InputError(f"scheduler: beta_schedule={kind!r} is not supported; pass schedule=")


def _is_flow(config: Mapping[str, Any]) -> bool:
    return str(config.get("_class_name", "")).startswith("FlowMatch") or bool(config.get("use_flow_sigmas"))
