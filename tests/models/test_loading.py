"""Checkpoints in one file: what is read back is what was written, and what is wrong is said in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from refusal import check_refusal
from safetensors.torch import load_file, save_file

from fastdiff import InputError, schedules
from fastdiff.models import Model, UNet, load_model, save_model

CONFIG = {
    "in_channels": 1,
    "out_channels": 1,
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "num_class_embeds": 4,
}


def small_model(**changes: object) -> Model:
    torch.manual_seed(0)
    fields = {
        "network": UNet(**CONFIG).eval(),
        "schedule": schedules.cosine(500),
        "prediction": "v",
        "sample_shape": (1, 8, 8),
        "num_classes": 3,
        "class_names": ("shirt", "shoe", "bag"),
        "training": {"hours": 1.5},
    }
    return Model(**{**fields, **changes})


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_model(small_model(), path)
    return path


def test_a_saved_model_comes_back(saved):
    model, loaded = small_model(), load_model(saved)
    assert loaded.network.config == model.network.config
    assert not loaded.network.training
    assert not any(parameter.requires_grad for parameter in loaded.network.parameters())
    for key, value in model.network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[key], value), key
    assert loaded.schedule.to_config() == model.schedule.to_config()
    for name in ("prediction", "sample_shape", "num_classes", "class_names", "null_label", "clip", "training"):
        assert getattr(loaded, name) == getattr(model, name), name
    assert loaded.null_label == 3


def test_half_the_bytes_and_any_layout(tmp_path):
    model = small_model()
    model.network.to(memory_format=torch.channels_last)
    save_model(model, tmp_path / "whole.safetensors")
    save_model(model, tmp_path / "half.safetensors", dtype=torch.float16)
    sizes = [(tmp_path / name).stat().st_size for name in ("whole.safetensors", "half.safetensors")]
    assert sizes[1] < 0.65 * sizes[0]
    loaded = load_model(tmp_path / "half.safetensors").network
    for key, value in model.network.state_dict().items():
        assert loaded.state_dict()[key].dtype == torch.float32
        assert torch.equal(loaded.state_dict()[key], value.half().float()), key


def test_no_label_only_where_there_is_a_row_for_it():
    assert small_model(num_classes=4, class_names=()).null_label is None
    assert small_model(num_classes=None, class_names=()).null_label is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 5, "class_names": ()}, "num_classes"),
        ({"class_names": ("shirt",)}, "class_names"),
        ({"sample_shape": (3, 8, 8)}, "sample_shape"),
        ({"prediction": "flow"}, "flow"),
    ],
    ids=["classes", "names", "shape", "prediction"],
)
def test_a_model_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        small_model(**changes)


def test_saving_keeps_the_old_file_when_it_fails(saved, monkeypatch):
    before = saved.read_bytes()

    def broken(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", broken)
    with pytest.raises(InputError, match="No space left on device"):
        save_model(small_model(prediction="epsilon"), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


@pytest.mark.parametrize("place", ["missing/model.safetensors", "file/model.safetensors"])
def test_a_path_that_cannot_be_written_is_named(tmp_path, place):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match=r"cannot be written .*; choose a path"):
        save_model(small_model(), tmp_path / place)


@pytest.mark.parametrize("part", [0.0, 1e-4, 0.05, 0.5, 0.999])
def test_a_truncated_file_is_said_to_be_so(saved, part):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(part * len(content))])
    check_refusal(saved, "not a whole safetensors file")


def edit_header(path: Path, **changes: object) -> None:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["fastdiff"])
    header.update(changes)
    save_file(load_file(path), path, metadata={"format": "pt", "fastdiff": json.dumps(header)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": {**CONFIG, "act_fn": "selu"}}, "act_fn='selu'"),
        ({"network": {**CONFIG, "block_out_channels": 7}}, "description does not fit"),
        ({"network": None}, "description does not fit"),
        ({"network": {**CONFIG, "block_out_channels": [8, 24]}}, "has shape .*, expected"),
        ({"network": {**CONFIG, "layers_per_block": 2}}, "tensors are missing, the first"),
        ({"schedule": {"name": "cosin"}}, "did you mean 'cosine'"),
        ({"sample_shape": [3, 8, 8]}, "sample_shape"),
        ({"num_classes": 70}, "num_classes"),
    ],
)
def test_a_description_that_does_not_fit_is_named(saved, changes, message):
    edit_header(saved, **changes)
    check_refusal(saved, message)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    check_refusal(path, "no description of its network")
    torch.save({"a": torch.zeros(2)}, path)
    check_refusal(path, "not a whole safetensors file")
    torch.save({"a": torch.zeros(2)}, tmp_path / "old.pt")
    check_refusal(tmp_path / "old.pt", "pickle")
    check_refusal(tmp_path / "nothing.safetensors", "no such file or folder, nor a model in the package")
