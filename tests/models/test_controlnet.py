"""Our ControlNet against diffusers' ControlNetModel with the same random weights."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from inputs import normal
from tolerance import assert_close_to_truth, relative_error
from torch import Tensor, nn

from fastdiff import InputError
from fastdiff.models.controlnet import ControlNet
from fastdiff.models.rewrites import Rewrites

SMALL = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "conditioning_embedding_out_channels": [4, 6],
    "layers_per_block": 1,
}
SDXL = {
    **SMALL,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "attention_head_dim": [2, 4],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 34,
    "layers_per_block": 2,
}
Case = tuple[dict[str, Any], tuple[int, int, int], dict[str, Any]]
CASES: dict[str, Case] = {
    "small": (SMALL, (2, 8, 8), {}),
    "odd sizes": (SMALL, (1, 7, 9), {"conditioning_scale": 0.7}),
    "guess mode": (SMALL, (3, 5, 6), {"guess_mode": True, "conditioning_scale": 0.9}),
    "pooled": ({**SMALL, "global_pool_conditions": True}, (2, 7, 5), {"guess_mode": True, "conditioning_scale": 0.5}),
    "bgr, classes": (
        {**SMALL, "controlnet_conditioning_channel_order": "bgr", "num_class_embeds": 5},
        (2, 6, 6),
        {"class_labels": torch.tensor([4, 1])},
    ),
    "embedded classes, scale-shift": (
        {**SMALL, "class_embed_type": "identity", "resnet_time_scale_shift": "scale_shift", "norm_num_groups": 2},
        (2, 6, 6),
        {"class_labels": normal(2, 32)},
    ),
    "projected classes, plain middle": (
        {
            **SMALL,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 7,
            "mid_block_type": "UNetMidBlock2D",
            "mid_block_scale_factor": 1.3,
            "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
        },
        (2, 6, 6),
        {"class_labels": normal(2, 7)},
    ),
    "sdxl": (
        SDXL,
        (2, 5, 7),
        {"added_cond_kwargs": {"text_embeds": normal(2, 10), "time_ids": normal(2, 6).abs().mul(100).round()}},
    ),
    "four-fold, one channel, unused projection of the text": (
        {**SMALL, "conditioning_channels": 1, "conditioning_embedding_out_channels": [3, 4, 5], "encoder_hid_dim": 9},
        (1, 3, 5),
        {},
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@cache
def library(name: str, dtype: torch.dtype) -> nn.Module:
    """The library's network; every parameter that starts at a constant is random, so that a forgotten one shows."""
    torch.manual_seed(7)
    network = ControlNetModel(**CASES[name][0]).eval().requires_grad_(False)
    for key, parameter in network.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(1.0 if "norm" in key and key.endswith("weight") else 0.0, 0.3)
        elif not parameter.any():
            parameter.normal_(0.0, 0.2)
    return network.to(dtype)


def ours(name: str, dtype: torch.dtype, rewrites: Rewrites | None = None) -> ControlNet:
    theirs = library(name, dtype)
    network = ControlNet(**theirs.config).eval().requires_grad_(False).to(dtype)
    network.load_state_dict(theirs.state_dict())
    network.rewrites = rewrites or Rewrites()
    return network


def call(network: nn.Module, name: str, dtype: torch.dtype) -> list[Tensor]:
    """All residuals, the middle's last."""
    config, (count, height, width), extras = CASES[name]
    factor = 2 ** (len(config["conditioning_embedding_out_channels"]) - 1)

    def converted(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: converted(item) for key, item in value.items()}
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    more = {} if isinstance(network, ControlNet) else {"return_dict": False}
    with torch.no_grad():
        down, middle = network(
            normal(count, 4, height, width).to(dtype),
            torch.tensor([1, 500, 999][:count]),
            normal(count, 5, 12).to(dtype),
            normal(count, config.get("conditioning_channels", 3), factor * height, factor * width).to(dtype),
            **{key: converted(value) for key, value in extras.items()},
            **more,
        )
    return [*down, middle]


@cache
def theirs(name: str, dtype: torch.dtype) -> list[Tensor]:
    return call(library(name, dtype), name, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_residuals_are_as_close_to_the_truth_as_the_librarys(name, dtype):
    actual = call(ours(name, DTYPES[dtype]), name, DTYPES[dtype])
    # Together, as they enter one U-Net: a single small map has too few elements for a steady error of its own.
    flat = [torch.cat([each.flatten() for each in maps]) for maps in (actual, theirs(name, torch.float64))]
    plain = torch.cat([each.flatten() for each in theirs(name, DTYPES[dtype])])
    assert [each.dtype for each in actual] == [DTYPES[dtype]] * len(actual)
    assert_close_to_truth(*flat, plain)


@pytest.mark.parametrize("rewrites", [Rewrites(), Rewrites.none()], ids=["all", "none"])
@pytest.mark.parametrize("name", CASES)
def test_float64_is_the_same_function(name, rewrites):
    actual = call(ours(name, torch.float64, rewrites), name, torch.float64)
    torch.testing.assert_close(actual, theirs(name, torch.float64), rtol=1e-9, atol=1e-10)


def test_a_mask_over_the_pixels_is_the_librarys():
    """Every attention over pixels reads the same mask, so that only a map with one size of them can have one."""
    mask = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1]])
    config = {**SMALL, "block_out_channels": [8], "down_block_types": ["CrossAttnDownBlock2D"]}
    torch.manual_seed(1)
    other = ControlNetModel(**config).eval().double().requires_grad_(False)
    for layer in (*other.controlnet_down_blocks, other.controlnet_mid_block):
        nn.init.normal_(layer.weight)
    network = ControlNet(**config).eval().double().requires_grad_(False)
    network.load_state_dict(other.state_dict())
    arguments = [normal(*shape, dtype=torch.float64) for shape in ((1, 4, 4, 4), (1, 5, 12), (1, 3, 8, 8))]
    sample, tokens, picture = arguments
    actual = network(sample, 3, tokens, picture, attention_mask=mask)
    expected = other(sample, 3, tokens, picture, attention_mask=mask, return_dict=False)
    torch.testing.assert_close((list(actual[0]), actual[1]), (list(expected[0]), expected[1]), rtol=1e-9, atol=1e-10)
    assert not torch.allclose(actual[1], network(sample, 3, tokens, picture)[1])


def test_classes_that_are_times_are_the_librarys():
    """In float32 only: in other dtypes the library's own call fails."""
    config = {**SMALL, "class_embed_type": "timestep"}
    other = ControlNetModel(**config).eval().requires_grad_(False)
    nn.init.normal_(other.controlnet_mid_block.weight)
    network = ControlNet(**config).eval().requires_grad_(False)
    network.load_state_dict(other.state_dict())
    arguments = (normal(2, 4, 6, 6), 3, normal(2, 5, 12), normal(2, 3, 12, 12))
    labels = torch.tensor([4, 100])
    expected = other(*arguments, class_labels=labels, return_dict=False)[1]
    assert relative_error(network(*arguments, class_labels=labels)[1], expected) < 1e-5


def test_one_picture_serves_all_samples():
    network = ours("small", torch.float64)
    x, tokens, picture = (normal(*shape, dtype=torch.float64) for shape in ((2, 4, 6, 6), (2, 5, 12), (1, 3, 12, 12)))
    torch.testing.assert_close(
        network(x, 3, tokens, picture)[1], network(x, 3, tokens, picture.expand(2, -1, -1, -1))[1]
    )


def test_at_first_it_adds_nothing():
    network = ControlNet(**SMALL).eval().requires_grad_(False)
    down, middle = network(normal(1, 4, 6, 6), 3, normal(1, 5, 12), normal(1, 3, 12, 12))
    assert not any(each.any() for each in (*down, middle))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"mid_block_type": None}, "ControlNet: mid_block_type=None"),
        ({"controlnet_conditioning_channel_order": "rbg"}, "controlnet_conditioning_channel_order='rbg'"),
        ({"conditioning_embedding_out_channels": []}, "conditioning_embedding_out_channels is empty"),
        ({"layers_per_block": [1, 2]}, "layers_per_block"),
        ({"act_fn": "selu"}, "act_fn='selu'"),
        ({"addition_embed_type": "image"}, "addition_embed_type='image'"),
        ({"down_block_types": ["SkipDownBlock2D"] * 2}, "SkipDownBlock2D"),
        ({"norm_num_groups": 3}, "not divisible by norm_num_groups=3"),
        ({"up_block_types": ["UpBlock2D"] * 2}, "up_block_types.*ControlNetModel"),
        ({"_class_name": "UNet2DModel"}, "_class_name='UNet2DModel'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_named(config, message):
    with pytest.raises(InputError, match=message):
        ControlNet(**{**SMALL, **config})


@pytest.mark.parametrize(
    ("sample", "picture", "message"),
    [
        ((2, 3, 6, 6), (2, 3, 12, 12), "ControlNet: sample has shape"),
        ((2, 4, 6, 6), (2, 4, 12, 12), "controlnet_cond has shape"),
        ((2, 4, 6, 6), (3, 3, 12, 12), "controlnet_cond has shape"),
        ((2, 4, 6, 6), (2, 3, 6, 12), r"expected \(2, 3, 12, 12\)"),
    ],
    ids=["channels", "picture-channels", "pictures", "size"],
)
def test_inputs_that_do_not_fit_are_named(sample, picture, message):
    with pytest.raises(InputError, match=message):
        ControlNet(**SMALL)(torch.zeros(sample), 3, torch.zeros(2, 5, 12), torch.zeros(picture))
