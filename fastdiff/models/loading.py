"""Checkpoints: one safetensors file of our own, or a folder in diffusers' format. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import safetensors.torch
import torch
from torch import Tensor, nn

from fastdiff import parameterization, schedules
from fastdiff.errors import CheckpointError, InputError
from fastdiff.files import write_atomic
from fastdiff.models import checkpoint_files, scheduler_config
from fastdiff.models.autoencoder import AutoencoderKL
from fastdiff.models.config import CONDITIONAL, spread
from fastdiff.models.unet import UNet
from fastdiff.schedules import Schedule

EMBEDDED = ("fashion",)
"""Names of the models inside the package."""

Network = TypeVar("Network", bound=nn.Module)

# Names of the attention's parameters before diffusers 0.15.
_OLD_ATTENTION = re.compile(r"(attentions\.\d+)\.(query|key|value|proj_attn)\.(weight|bias)$")
_NEW_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Model:
    """A network and what sampling from it needs.

    schedule       the noise it was trained with; prediction: "epsilon", "v", "sample" or "flow"
    sample_shape   (C, H, W) of one sample; () where the checkpoint does not say
    num_classes    None without classes; class_names has a name for each, or is empty
    clip           bound of the data prediction in training, None for none
    training       what the file says about its training
    """

    network: UNet
    schedule: Schedule
    prediction: str
    sample_shape: tuple[int, ...]
    num_classes: int | None = None
    class_names: tuple[str, ...] = ()
    clip: float | None = 1.0
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parameterization.check(self.prediction, self.schedule)
        rows, channels = self.network.config["num_class_embeds"], self.network.config["in_channels"]
        if self.num_classes is not None and (rows is None or rows < self.num_classes):
            raise InputError(
                f"num_classes: expected at most the network's num_class_embeds={rows}, got {self.num_classes}"
            )
        if self.class_names and len(self.class_names) != self.num_classes:
            raise InputError(f"class_names: expected {self.num_classes} names, got {len(self.class_names)}")
        if self.sample_shape and (len(self.sample_shape) != 3 or self.sample_shape[0] != channels):
            raise InputError(f"sample_shape: expected ({channels}, H, W), got {self.sample_shape}")

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class, after all others; None where the network has no row for it."""
        has_row = self.num_classes is not None and self.network.config["num_class_embeds"] > self.num_classes
        return self.num_classes if has_row else None


def load_model(
    name_or_path: str | os.PathLike[str], *, schedule: Schedule | None = None, prediction: str | None = None
) -> Model:
    """A model by name ("fashion", inside the package), from a file of `save_model`, or from a diffusers folder.

    A folder holds config.json and diffusion_pytorch_model.safetensors, itself or in unet/, and if it tells its noise
    schedule, scheduler/scheduler_config.json. schedule, prediction: taken instead of what the checkpoint says.
    The network comes on the CPU, in float32 and evaluation mode, without gradients.

    Errors: CheckpointError, in one line, for what is missing, truncated, foreign, pickled, or does not fit.
    """
    if name_or_path in EMBEDDED:
        asset = resources.files("fastdiff.assets") / f"{name_or_path}.safetensors"
        if not asset.is_file():
            raise CheckpointError(f"{name_or_path}: this installation lacks the model's file; reinstall fastdiff")
        with resources.as_file(asset) as path:
            return _load(path, schedule, prediction)
    return _load(Path(name_or_path), schedule, prediction)


def load_autoencoder(path: str | os.PathLike[str]) -> AutoencoderKL:
    """The autoencoder of a diffusers folder: config.json and the weights as safetensors, itself or in vae/.

    It comes on the CPU, in float32 and evaluation mode, without gradients.

    Errors: CheckpointError, in one line, as for `load_model`.
    """
    path = Path(path)
    if path.suffix in checkpoint_files.PICKLES:
        raise CheckpointError(checkpoint_files.pickled(path))
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; expected an autoencoder in diffusers' format")
    try:
        folder = checkpoint_files.model_folder(path, "vae")
        network = _from_config(
            AutoencoderKL, checkpoint_files.json_object(folder / "config.json"), folder / "config.json"
        )
        _fill(network, checkpoint_files.folder_tensors(folder), folder)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    return network


def save_model(
    model: Model,
    path: str | os.PathLike[str],
    *,
    training: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model as one safetensors file, whole or not at all. dtype: what the weights are stored in.

    Errors: InputError if the path cannot be written; a file that was there is then untouched.
    """
    header = {
        "network": model.network.config,
        "schedule": model.schedule.to_config(),
        "prediction": model.prediction,
        "sample_shape": list(model.sample_shape),
        "num_classes": model.num_classes,
        "class_names": list(model.class_names),
        "clip": model.clip,
        "training": dict(model.training if training is None else training),
    }
    tensors = {name: tensor.detach().cpu().to(dtype) for name, tensor in model.network.state_dict().items()}
    # Parameters in channels-last order are stored in the plain one.
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {"format": "pt", "fastdiff": json.dumps(header)}
    write_atomic(path, safetensors.torch.save(tensors, metadata=metadata))


def _load(path: Path, schedule: Schedule | None, prediction: str | None) -> Model:
    if not path.exists():
        known = ", ".join(repr(name) for name in EMBEDDED)
        raise CheckpointError(f"{path}: no such file or folder, nor a model in the package ({known})")
    if path.suffix in checkpoint_files.PICKLES:
        raise CheckpointError(checkpoint_files.pickled(path))
    try:
        load = _load_folder if path.is_dir() else _load_file
        return load(path, schedule, prediction)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


def _load_file(path: Path, schedule: Schedule | None, prediction: str | None) -> Model:
    tensors, metadata = checkpoint_files.file_tensors(path)
    if "fastdiff" not in metadata:
        raise CheckpointError(
            f"{path}: has no description of its network; expected a file written by fastdiff, "
            "or pass the folder with its config.json"
        )
    try:
        header = json.loads(metadata["fastdiff"])
        model = Model(
            network=_network(UNet, header["network"]),
            schedule=schedules.from_config(header["schedule"]) if schedule is None else schedule,
            prediction=header["prediction"] if prediction is None else prediction,
            sample_shape=tuple(header["sample_shape"]),
            num_classes=header["num_classes"],
            class_names=tuple(header["class_names"]),
            clip=header.get("clip", 1.0),
            training=header.get("training", {}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its description does not fit fastdiff ({error})") from error
    _fill(model.network, tensors, path)
    return model


def _load_folder(path: Path, schedule: Schedule | None, prediction: str | None) -> Model:
    folder = checkpoint_files.model_folder(path, "unet")
    tensors = checkpoint_files.folder_tensors(folder)
    network = _from_config(UNet, checkpoint_files.json_object(folder / "config.json"), folder / "config.json")
    _fill(network, tensors, folder)
    said, place = _scheduler(folder, network)
    if schedule is None and not place.is_file():
        warnings.warn(
            f"{folder}: has no scheduler_config.json; taking the schedule {said['beta_schedule']!r} and predictions of "
            "epsilon (pass schedule= and prediction= to say otherwise)",
            stacklevel=4,
        )
    size, channels = network.config["sample_size"], network.config["in_channels"]
    try:
        return Model(
            network=network,
            schedule=scheduler_config.schedule(said) if schedule is None else schedule,
            prediction=scheduler_config.prediction(said) if prediction is None else prediction,
            sample_shape=() if size is None else (channels, *spread(size, 2)),
            num_classes=network.config["num_class_embeds"],
            clip=scheduler_config.clip(said),
        )
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{place}: {error}") from error


def _scheduler(folder: Path, network: UNet) -> tuple[dict[str, Any], Path]:
    """The scheduler's configuration beside the network or in the pipeline's folder around it, or a usual one."""
    for place in (folder, folder / "scheduler", folder.parent / "scheduler"):
        path = place / "scheduler_config.json"
        if path.is_file():
            return checkpoint_files.json_object(path), path
    if network.config["_class_name"] == CONDITIONAL:
        usual = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    else:
        usual = {"beta_schedule": "linear", "clip_sample": True}
    return usual, folder / "scheduler_config.json"


def _from_config(kind: type[Network], config: Mapping[str, Any], path: Path) -> Network:
    try:
        return _network(kind, config)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def _network(kind: type[Network], config: Mapping[str, Any]) -> Network:
    # On the meta device no memory is filled with random numbers that the file's tensors replace at once.
    with torch.device("meta"):
        return kind(**config).eval().requires_grad_(False)


def _fill(network: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Put the tensors in the place of the network's own, in float32."""
    expected = network.state_dict()
    tensors = {
        _OLD_ATTENTION.sub(lambda m: f"{m[1]}.{_NEW_ATTENTION[m[2]]}.{m[3]}", key): t for key, t in tensors.items()
    }
    problems = []
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"{len(missing)} tensors are missing, the first {missing[0]}")
    if unexpected := sorted(tensors.keys() - expected.keys()):
        problems.append(f"{len(unexpected)} are not of this network, the first {unexpected[0]}")
    for key in sorted(expected.keys() & tensors.keys()):
        if tensors[key].shape != expected[key].shape:
            problems.append(f"{key} has shape {tuple(tensors[key].shape)}, expected {tuple(expected[key].shape)}")
            break
    if problems:
        raise CheckpointError(f"{path}: does not fit its configuration: {'; '.join(problems)}")
    network.load_state_dict({key: tensor.float() for key, tensor in tensors.items()}, assign=True)
