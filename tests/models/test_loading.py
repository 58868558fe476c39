"""Checkpoints: what is read back is what was written, and what is wrong is said in one line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from layouts import CASES
from safetensors.torch import load_file, save_file

from fastdiff import CheckpointError, InputError, schedules
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


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    CASES["adm"].network().save_pretrained(tmp_path / "adm")
    return tmp_path / "adm"


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
        ({"network": {**CONFIG, "act_fn": "mish"}}, "act_fn='mish'"),
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


def check_refusal(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_of_the_library(folder):
    with pytest.warns(UserWarning, match="no scheduler_config.json; taking the schedule 'linear'"):
        model = load_model(folder)
    assert model.sample_shape == (3, 16, 16)
    assert (model.num_classes, model.null_label, model.prediction, model.schedule.name) == (
        11,
        None,
        "epsilon",
        "linear",
    )
    chosen = load_model(folder, schedule=schedules.cosine(100), prediction="v")
    assert (chosen.prediction, chosen.schedule.steps) == ("v", 100)


def test_a_pipeline_folder_and_shards(tmp_path):
    library = CASES["adm"].network()
    library.save_pretrained(tmp_path / "unet", max_shard_size="200KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_end=0.015, clip_sample=False).save_pretrained(
        tmp_path / "scheduler"
    )
    for path in (tmp_path, tmp_path / "unet"):
        model = load_model(path)
        assert model.clip is None
        assert model.schedule.to_config()["beta_end"] == 0.015
        assert torch.equal(model.network.state_dict()["conv_in.weight"], library.conv_in.weight)


def test_names_of_old_attention_blocks(tmp_path):
    library = CASES["ddpm-cifar10"].network()
    library.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
        tensors = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in tensors.items()}
    save_file(tensors, path)
    network = load_model(tmp_path, schedule=schedules.linear()).network
    for key, value in library.state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key


@pytest.mark.parametrize("kind", ["missing", "unexpected", "shape", "pickle", "empty", "json", "truncated", "foreign"])
def test_a_broken_folder_is_refused(folder, kind):
    weights = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    name = sorted(tensors)[0]
    message = {
        "missing": f"1 tensors are missing, the first {name}",
        "unexpected": "1 are not of this network, the first extra",
        "shape": rf"{name} has shape \(3,\), expected",
        "pickle": "is a pickle",
        "empty": "holds no config.json",
        "json": "is not JSON",
        "truncated": "not a whole safetensors file",
        "foreign": "_class_name='AutoencoderKL'",
    }[kind]
    if kind == "missing":
        del tensors[name]
    elif kind == "unexpected":
        tensors["extra"] = torch.zeros(1)
    elif kind == "shape":
        tensors[name] = torch.zeros(3)
    elif kind == "pickle":
        torch.save(tensors, weights.with_suffix(".bin"))
    elif kind == "empty":
        (folder / "config.json").unlink()
    elif kind == "json":
        (folder / "config.json").write_text('{"in_channels": 3,')
    elif kind == "foreign":
        (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    save_file(tensors, weights)
    if kind == "pickle":
        weights.unlink()
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1])
    check_refusal(folder, message)


def test_a_shard_index_cannot_point_outside(folder, tmp_path):
    shutil.copy(folder / "diffusion_pytorch_model.safetensors", tmp_path / "elsewhere.safetensors")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../elsewhere.safetensors"}}))
    check_refusal(folder, "expected the names of files beside it")
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "gone.safetensors"}}))
    check_refusal(folder, "cannot be read .*gone.safetensors")


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.DDPMScheduler(),
        diffusers.DDPMScheduler(beta_schedule="sigmoid", num_train_timesteps=300),
        diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        diffusers.DDIMScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample_range=2.0
        ),
        diffusers.PNDMScheduler(trained_betas=np.linspace(1e-4, 0.03, 50).tolist()),
        diffusers.EulerDiscreteScheduler(prediction_type="sample"),
    ],
    ids=["ddpm", "sigmoid", "latent", "cosine-v", "trained-betas", "euler"],
)
def test_the_schedule_is_the_librarys(folder, scheduler):
    scheduler.save_pretrained(folder)
    model = load_model(folder)
    truth = torch.cumprod(1.0 - scheduler.betas.double(), dim=0).numpy()
    # The library computes its betas in float32.
    np.testing.assert_allclose(model.schedule.alphas**2, truth, rtol=2e-4)
    expected = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}[scheduler.config.prediction_type]
    assert model.prediction == expected
    assert model.clip == (scheduler.config.clip_sample_range if scheduler.config.get("clip_sample") else None)


def test_a_flow_schedule(folder):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.save_pretrained(folder)
    model = load_model(folder)
    assert model.prediction == "flow"
    np.testing.assert_allclose(model.schedule.sigmas, scheduler.sigmas.numpy()[::-1], rtol=1e-5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rescale_betas_zero_snr", True),
        ("beta_schedule", "laplace"),
        ("prediction_type", "score"),
        ("num_train_timesteps", "many"),
        ("beta_start", -1),
    ],
)
def test_a_scheduler_file_that_cannot_be_followed(folder, key, value):
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler", key: value}))
    check_refusal(folder, re.escape(str(value)))
    if key != "prediction_type":
        assert load_model(folder, schedule=schedules.linear()).schedule.name == "linear"
