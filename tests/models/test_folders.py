"""Folders in the format of diffusers: read as the library would, or refused in one line."""

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
from refusal import check_refusal
from safetensors.torch import load_file, save_file

from fastdiff import schedules
from fastdiff.models import load_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    CASES["adm"].network().save_pretrained(tmp_path / "adm")
    return tmp_path / "adm"


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
        diffusers.DDPMScheduler(beta_schedule="laplace"),
        diffusers.DDIMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
    ],
    ids=["ddpm", "sigmoid", "latent", "cosine-v", "trained-betas", "euler", "laplace", "zero-snr"],
)
def test_the_schedule_is_the_librarys(folder, scheduler):
    scheduler.save_pretrained(folder)
    model = load_model(folder)
    truth = torch.cumprod(1.0 - scheduler.betas.double(), dim=0).numpy()
    # The library computes its betas in float32.
    np.testing.assert_allclose(model.schedule.alphas**2, truth, rtol=2e-4, atol=1e-7)
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
        ("shift_terminal", 0.1),
        ("beta_schedule", "geometric"),
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
