"""Our U-Net against diffusers' with the same random weights, loaded from a folder that the library wrote."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from inputs import LAYOUTS
from layouts import ADM, CASES, DDPM_CIFAR10, SD15, SDXL
from tolerance import assert_close_to_truth

from fastdiff import InputError
from fastdiff.models import UNet, load_model
from fastdiff.schedules import linear

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A function from a case's name to our network, loaded from the library's own saved folder."""

    @cache
    def build(name: str) -> UNet:
        folder = tmp_path_factory.mktemp(name)
        CASES[name].network().save_pretrained(folder)
        return load_model(folder, schedule=linear()).network

    return build


@cache
def theirs(name: str, dtype: torch.dtype) -> torch.Tensor:
    return CASES[name].call(CASES[name].network(), dtype, torch.contiguous_format)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_output_is_as_close_to_the_truth_as_the_library(ours, name, dtype, layout):
    actual = CASES[name].call(ours(name).float(), DTYPES[dtype], LAYOUTS[layout])
    assert actual.dtype == DTYPES[dtype]
    assert_close_to_truth(actual, theirs(name, torch.float64), theirs(name, DTYPES[dtype]))


@pytest.mark.parametrize("name", CASES)
def test_float64_is_the_same_function(name):
    """To float64 rounding: nothing that float32 could hide."""
    library = CASES[name].network()
    network = UNet(**library.config)
    network.load_state_dict(library.state_dict())
    actual = CASES[name].call(network.eval(), torch.float64, torch.contiguous_format)
    torch.testing.assert_close(actual, theirs(name, torch.float64), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", ["ddpm-cifar10", "adm", "sd15", "sdxl"])
def test_every_map_keeps_the_layout(ours, name):
    network, layouts = ours(name), []

    def record(module: torch.nn.Module, _: object, out: object) -> None:
        if isinstance(out, torch.Tensor) and out.dim() == 4:
            layouts.append((module, out.is_contiguous(memory_format=torch.channels_last)))

    hooks = [module.register_forward_hook(record) for module in network.modules()]
    try:
        CASES[name].call(network, torch.float32, torch.channels_last)
    finally:
        for hook in hooks:
            hook.remove()
    assert layouts
    assert [module for module, kept in layouts if not kept] == []


def test_any_size_where_the_library_refuses():
    network = UNet(**DDPM_CIFAR10).eval()
    with torch.no_grad():
        assert network(torch.randn(1, 3, 27, 33), 3).shape == (1, 3, 27, 33)


def test_a_batch_is_its_samples():
    network = UNet(**ADM).double().eval()
    x, t, labels = torch.randn(3, 3, 16, 16, dtype=torch.float64), torch.tensor([1, 50, 900]), torch.tensor([2, 10, 5])
    with torch.no_grad():
        whole = network(x, t, class_labels=labels)
        parts = [network(x[i : i + 1], int(t[i]), class_labels=labels[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(whole, torch.cat(parts))


def test_it_compiles_without_a_graph_break():
    small = {
        "block_out_channels": [8],
        "norm_num_groups": 4,
        "down_block_types": ["CrossAttnDownBlock2D"],
        "mid_block_type": None,
        "up_block_types": ["AttnUpBlock2D"],
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "layers_per_block": 1,
    }
    network = UNet(**small).eval().requires_grad_(False)
    arguments = (torch.randn(1, 4, 5, 6), torch.tensor([3]), torch.randn(1, 7, 12))
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*arguments), network(*arguments))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"act_fn": "selu"}, "act_fn='selu'"),
        ({"down_block_types": ["DownEncoderBlock2D"] * 4}, "down_block_types='DownEncoderBlock2D'"),
        ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial'"),
        ({"dual_cross_attention": True, "cross_attention_dim": 8}, "dual_cross_attention=True"),
        (
            {"cross_attention_dim": 8, "addition_embed_type": "image"},
            "addition_embed_type='image' needs encoder_hid_dim",
        ),
        ({"cross_attention_dim": 8, "addition_embed_type": "sound"}, "addition_embed_type='sound'"),
        ({"downsample_padding": -1}, "downsample_padding=-1"),
        ({"cross_attention_dim": 8, "addition_embed_type": "text_time"}, "addition_time_embed_dim"),
        ({"time_embedding_type": "learned"}, "num_train_timesteps"),
        ({"norm_num_group": 8}, "norm_num_group=8.*did you mean 'norm_num_groups'"),
        ({"norm_num_groups": 30}, "not divisible by norm_num_groups=30"),
        ({"block_out_channels": [32, 64]}, "4 entries; expected 2"),
        ({"_class_name": "UNet3DConditionModel"}, "_class_name='UNet3DConditionModel'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_named(config, message):
    with pytest.raises(InputError, match=message):
        UNet(**config)


@pytest.mark.parametrize(
    ("config", "shape", "arguments", "message"),
    [
        (DDPM_CIFAR10, (1, 4, 8, 8), {}, "sample has shape"),
        (DDPM_CIFAR10, (1, 3, 8, 8), {"class_labels": torch.tensor([1])}, "class_labels"),
        (ADM, (1, 3, 8, 8), {}, "class_labels is None"),
        (SD15, (1, 4, 8, 8), {}, "encoder_hidden_states is None"),
        (
            SD15,
            (2, 4, 8, 8),
            {"encoder_hidden_states": torch.zeros(1, 7, 48)},
            r"encoder_hidden_states is \(1, 7, 48\)",
        ),
        (DDPM_CIFAR10, (3, 3, 8, 8), {"timestep": torch.tensor([1, 2])}, r"timestep has shape \(2,\)"),
    ],
    ids=["channels", "labels-for-none", "no-labels", "no-tokens", "tokens-batch", "times"],
)
def test_inputs_that_do_not_fit_are_named(config, shape, arguments, message):
    with pytest.raises(InputError, match=message), torch.no_grad():
        UNet(**config)(torch.randn(shape), **{"timestep": 3, **arguments})


FULL_SIZE = {
    "ddpm-cifar10-32": (UNet2DModel, {**DDPM_CIFAR10, "block_out_channels": [128, 256, 256, 256]}),
    "ddpm-celebahq-256": (
        UNet2DModel,
        {
            **DDPM_CIFAR10,
            "sample_size": 256,
            "block_out_channels": [128, 128, 256, 256, 512, 512],
            "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
        },
    ),
    "stable-diffusion-v1-5": (UNet2DConditionModel, {"cross_attention_dim": 768}),
    "stable-diffusion-2-1": (
        UNet2DConditionModel,
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
    ),
    "stable-diffusion-xl": (
        UNet2DConditionModel,
        {
            **SDXL,
            "block_out_channels": [320, 640, 1280],
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "transformer_layers_per_block": [1, 2, 10],
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
    ),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_networks_have_the_librarys_parameters(name):
    kind, config = FULL_SIZE[name]
    with torch.device("meta"):
        library, network = kind(**config), UNet(_class_name=kind.__name__, **config)
    assert shapes(network) == shapes(library)


def shapes(network: torch.nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in network.named_parameters()}
