"""A run's state on disk: one safetensors file, written atomically, from which training continues bit for bit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save
from torch import Tensor

from fastdiff.errors import CheckpointError
from fastdiff.files import write_atomic

_FORMAT = "fastdiff-training-1"


def ema_decay(step: int, final: float) -> float:
    """min(final, (1 + step) / (10 + step)): the first averages forget the random start quickly."""
    return min(final, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(average: torch.nn.Module, network: torch.nn.Module, decay: float) -> None:
    """average = decay average + (1 - decay) weights, parameter by parameter, in place."""
    for a, w in zip(average.parameters(), network.parameters(), strict=True):
        a.lerp_(w, 1.0 - decay)


@dataclass
class Progress:
    """Where a run stands.

    history   (step, training loss since the last evaluation, validation loss or None)
    lengths   (steps done, steps of the whole run) whenever a resumed run was made longer or shorter
    """

    step: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    best: float | None = None
    stale: int = 0
    history: list[tuple[int, float, float | None]] = field(default_factory=list)
    finished: bool = False
    lengths: list[tuple[int, int]] = field(default_factory=list)


def save_state(
    path: Path, tensors: dict[str, Tensor], progress: Progress, *, settings: dict[str, Any], fingerprint: str
) -> None:
    """Write everything a run needs to continue."""
    header = {"format": _FORMAT, "settings": settings, "data": fingerprint, "progress": asdict(progress)}
    flat = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomic(path, save(flat, metadata={"fastdiff": json.dumps(header, sort_keys=True)}))


def load_state(path: Path, *, settings: dict[str, Any], fingerprint: str) -> tuple[dict[str, Tensor], Progress]:
    """Read a state written by `save_state` and check that it belongs to these settings, save "steps", and this data.

    Errors: CheckpointError for a missing, truncated or foreign file, or one of another run.
    """
    if not path.exists():
        raise CheckpointError(f"resume: expected a training state at {path}, got none; start without --resume")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("fastdiff", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    except (OSError, safetensors.SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: expected a training state, which this is not ({error})") from error
    if header.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: expected a training state of fastdiff, got another safetensors file")
    changed = [
        f"{name} was {header['settings'].get(name)!r} and is {settings.get(name)!r}"
        for name in sorted(header["settings"].keys() | settings.keys())
        if name != "steps" and header["settings"].get(name) != settings.get(name)
    ]
    if changed:
        raise CheckpointError(f"{path}: belongs to a run with other settings: {'; '.join(changed)}")
    if header["data"] != fingerprint:
        raise CheckpointError(f"{path}: belongs to a run on other data; resume with the data it began with")
    progress = Progress(**header["progress"])
    progress.history = [(step, loss, validation) for step, loss, validation in progress.history]
    progress.lengths = [(done, steps) for done, steps in progress.lengths]
    if settings["steps"] < progress.step:
        raise CheckpointError(f"{path}: stands at step {progress.step}, beyond the {settings['steps']} asked for")
    if settings["steps"] != header["settings"]["steps"]:
        progress.lengths.append((progress.step, settings["steps"]))
        progress.finished = False
    return tensors, progress
