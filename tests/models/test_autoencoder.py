"""Our autoencoder against diffusers' AutoencoderKL with the same random weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from inputs import DTYPES, LAYOUTS, normal
from safetensors.torch import load_file, save_file
from tolerance import assert_close_to_truth

import fastdiff
from fastdiff import CheckpointError, InputError
from fastdiff.models import AutoencoderKL
from fastdiff.models.rewrites import Rewrites


def stages(count: int, *, attention: str = "") -> dict[str, Any]:
    """Kinds of blocks; `attention` has an "a" for each stage, from the picture down, with attention."""
    kinds = attention.ljust(count)
    return {
        "down_block_types": ["AttnDownEncoderBlock2D" if kind == "a" else "DownEncoderBlock2D" for kind in kinds],
        "up_block_types": ["AttnUpDecoderBlock2D" if kind == "a" else "UpDecoderBlock2D" for kind in reversed(kinds)],
    }


@dataclass(frozen=True)
class Case:
    """A configuration, and the shapes (N, H, W) of one picture and of the latents of another."""

    config: dict[str, Any]
    picture: tuple[int, int, int]
    latents: tuple[int, int, int]


SD = {"block_out_channels": [32, 64, 96, 96], "layers_per_block": 2, **stages(4)}
CASES = {
    "sd": Case(SD, (1, 32, 32), (2, 4, 4)),
    "one-stage": Case({}, (2, 8, 9), (1, 7, 5)),
    "odd": Case({**SD, "norm_num_groups": 16}, (3, 37, 27), (3, 3, 5)),
    "one-group": Case({"block_out_channels": [5, 10, 15], "norm_num_groups": 1, **stages(3)}, (2, 15, 13), (2, 1, 3)),
    "groups-of-one": Case(
        {"block_out_channels": [6, 12], "norm_num_groups": 6, "in_channels": 1, "out_channels": 4, **stages(2)},
        (1, 13, 16),
        (3, 5, 6),
    ),
    "wide-head": Case({"block_out_channels": [32, 288], **stages(2)}, (1, 9, 6), (1, 3, 5)),
    "sixteen-channels": Case(
        {
            "block_out_channels": [32, 64],
            "latent_channels": 16,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "shift_factor": 0.1159,
            **stages(2),
        },
        (2, 10, 14),
        (1, 6, 6),
    ),
    "without-attention": Case(
        {"block_out_channels": [32, 32], "mid_block_add_attention": False, "use_quant_conv": False, **stages(2)},
        (1, 11, 8),
        (1, 4, 3),
    ),
    "attention-in-stages": Case(
        {"block_out_channels": [12, 24, 20], "norm_num_groups": 4, "layers_per_block": 2, **stages(3, attention=" aa")},
        (2, 14, 17),
        (2, 3, 4),
    ),
}


def library(name: str) -> diffusers.AutoencoderKL:
    """The library's network; every affine parameter is random, so that a forgotten one shows."""
    torch.manual_seed(7)
    network = diffusers.AutoencoderKL(**CASES[name].config).eval().requires_grad_(False)
    for key, parameter in network.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.3)
    return network


def ours(name: str) -> AutoencoderKL:
    theirs = library(name)
    network = AutoencoderKL(**theirs.config).eval().requires_grad_(False)
    network.load_state_dict(theirs.state_dict())
    return network


def inputs(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A picture and latents."""
    case = CASES[name]
    (n, *size), (m, *small) = case.picture, case.latents
    return (
        normal(n, case.config.get("in_channels", 3), *size),
        normal(m, case.config.get("latent_channels", 4), *small, seed=1),
    )


@cache
def expected(name: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mean and deviation of the picture's latents, and the picture of the latents, as the library has them."""
    network = library(name).to(dtype)
    picture, latents = (value.to(dtype) for value in inputs(name))
    distribution = network.encode(picture).latent_dist
    return distribution.mean, distribution.std, network.decode(latents).sample


def check(network: AutoencoderKL, name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Holds all three results to the tolerance rule."""
    picture, latents = (value.to(dtype, memory_format=layout) for value in inputs(name))
    network = network.to(dtype, memory_format=layout)
    actual = (*network.encode(picture), network.decode(latents))
    for value, truth, plain in zip(actual, expected(name, torch.float64), expected(name, dtype), strict=True):
        assert value.dtype == dtype
        assert_close_to_truth(value, truth, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_both_ways_are_as_close_to_the_truth_as_the_library(name, dtype, layout):
    check(ours(name), name, DTYPES[dtype], LAYOUTS[layout])


@pytest.mark.parametrize("name", CASES)
def test_float64_is_the_same_function(name):
    """To float64 rounding: nothing that float32 could hide."""
    network = ours(name).double()
    picture, latents = (value.double() for value in inputs(name))
    actual = (*network.encode(picture), network.decode(latents))
    for value, truth in zip(actual, expected(name, torch.float64), strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-9, atol=1e-10)
    mean = library(name).double()(picture).sample
    torch.testing.assert_close(network(picture), mean, rtol=1e-9, atol=1e-10)


USED = ("unit_scale", "channels_last", "group_norm_silu", "upsample_conv", "folded_bias", "folded_residual", "qkv")
"""The rewrites that say something about an autoencoder."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("chosen", [(), *((name,) for name in USED)], ids=lambda chosen: "+".join(chosen) or "none")
@pytest.mark.parametrize("name", ["odd", "attention-in-stages"])
def test_each_rewrite_alone_preserves_the_result(name, chosen, dtype):
    network = ours(name)
    network.rewrites = Rewrites.parse(chosen)
    check(network, name, DTYPES[dtype], torch.contiguous_format)


def test_a_long_variance_is_held():
    network, theirs = ours("one-stage"), library("one-stage")
    for each in (network, theirs):
        each.quant_conv.bias[4:] = torch.tensor([1e3, -1e3, 0.0, 1.0])
    picture = inputs("one-stage")[0]
    torch.testing.assert_close(network.encode(picture)[1], theirs.encode(picture).latent_dist.std)


WHOLE = {
    "stable-diffusion-v1-5": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, **stages(4)},
    "flux": {
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        "latent_channels": 16,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        **stages(4),
    },
}


@pytest.mark.parametrize("name", WHOLE)
def test_full_size_networks_have_the_librarys_parameters(name):
    with torch.device("meta"):
        theirs, network = diffusers.AutoencoderKL(**WHOLE[name]), AutoencoderKL(**WHOLE[name])
    shapes = [{key: value.shape for key, value in each.named_parameters()} for each in (network, theirs)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("old", [False, True], ids=["", "old-names"])
@pytest.mark.parametrize("inside", [False, True], ids=["own-folder", "pipeline-folder"])
def test_a_folder_of_the_library(tmp_path, inside, old):
    theirs = library("one-stage")
    theirs.save_pretrained(tmp_path / "vae")
    if old:
        path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(path)
        for new, before in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            tensors = {key.replace(f".{new}.", f".{before}."): tensor for key, tensor in tensors.items()}
        save_file(tensors, path)
    network = fastdiff.load_autoencoder(tmp_path if inside else tmp_path / "vae")
    assert not network.training
    assert {key: value for key, value in network.config.items() if key != "_class_name"} == {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in theirs.config.items()
        if not key.startswith("_")
    }
    for key, value in theirs.state_dict().items():
        assert torch.equal(network.state_dict()[key], value), key


REFUSALS = {
    "absent": "no such folder",
    "pickle": "is a pickle",
    "empty": "holds no config.json",
    "foreign": "_class_name='UNet2DModel' is not supported",
    "key": "latent_chanels=4 is not a configuration key.*did you mean 'latent_channels'",
    "missing": "1 tensors are missing, the first decoder.conv_in.bias",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_broken_folder_is_refused(tmp_path, kind):
    folder = tmp_path / "vae"
    library("one-stage").save_pretrained(folder)
    path = folder
    if kind == "absent":
        shutil.rmtree(folder)
    elif kind == "pickle":
        path = folder / "model.pth"
    elif kind == "empty":
        (folder / "config.json").unlink()
    elif kind == "missing":
        weights = folder / "diffusion_pytorch_model.safetensors"
        save_file({key: tensor for key, tensor in load_file(weights).items() if key != "decoder.conv_in.bias"}, weights)
    else:
        change = {"_class_name": "UNet2DModel"} if kind == "foreign" else {"latent_chanels": 4}
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError, match=REFUSALS[kind]) as caught:
        fastdiff.load_autoencoder(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"act_fn": "mish"}, "act_fn='mish'"),
        ({"down_block_types": ["DownBlock2D"]}, "down_block_types='DownBlock2D'"),
        ({"up_block_types": ["UpBlock2D"]}, "up_block_types='UpBlock2D'"),
        ({"latent_channel": 8}, "latent_channel=8.*did you mean 'latent_channels'"),
        ({"norm_num_groups": 30}, "block_out_channels=64 is not divisible by norm_num_groups=30"),
        ({"block_out_channels": [32, 64]}, "down_block_types has 1 entries; expected 2"),
        ({"layers_per_block": [1]}, r"layers_per_block=\[1\]; expected a whole number from 1"),
        ({"latent_channels": 0}, "latent_channels=0; expected a whole number from 1"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name='AutoencoderTiny'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_named(config, message):
    with pytest.raises(InputError, match=message):
        AutoencoderKL(**config)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 4, 8, 8)], ids=["3-dimensional", "channels"])
def test_a_picture_that_does_not_fit_is_named(shape):
    with pytest.raises(InputError, match=r"the input has shape .* expected \(N, 3, H, W\)"):
        ours("one-stage").encode(torch.zeros(shape))


@pytest.mark.parametrize("name", ["one-stage", "sixteen-channels"])
def test_latents_that_do_not_fit_are_named(name):
    channels = CASES[name].config.get("latent_channels", 4)
    with pytest.raises(InputError, match=rf"the input has shape .* expected \(N, {channels}, H, W\)"):
        ours(name).decode(torch.zeros(1, channels + 1, 4, 4))
