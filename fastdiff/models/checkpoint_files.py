"""Reading the files of a checkpoint: safetensors and JSON, each error a CheckpointError in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from fastdiff.errors import CheckpointError

PICKLES = (".bin", ".ckpt", ".pt", ".pth")

_WEIGHTS = "diffusion_pytorch_model"


def model_folder(path: Path, part: str) -> Path:
    """The folder itself, or that of the part if it is a pipeline's."""
    folder = path / part if (path / part / "config.json").is_file() else path
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{path}: holds no config.json; expected a model folder in diffusers' format")
    return folder


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    index = folder / f"{_WEIGHTS}.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json_object(index).get("weight_map", {}).values()))
        # A name with a folder in it could point anywhere on the machine.
        if not names or any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index}: expected the names of files beside it, got {names}")
        shards = [file_tensors(folder / name)[0] for name in names]
        return {key: tensor for shard in shards for key, tensor in shard.items()}
    for name in (f"{_WEIGHTS}.safetensors", f"{_WEIGHTS}.fp16.safetensors"):
        if (folder / name).is_file():
            return file_tensors(folder / name)[0]
    if (folder / f"{_WEIGHTS}.bin").is_file():
        raise CheckpointError(pickled(folder / f"{_WEIGHTS}.bin"))
    raise CheckpointError(f"{folder}: holds no {_WEIGHTS}.safetensors")


def pickled(path: Path) -> str:
    return f"{path}: is a pickle, which can run code, and is not read; save the model as safetensors and pass that"


def file_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path}: is not a whole safetensors file ({error})") from error


def json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
