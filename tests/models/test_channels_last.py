"""Maps lie channels-last in every layer, also where a size of 1 leaves open how they lie, and are multiplied so."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from inputs import normal
from tolerance import assert_close_to_truth
from torch import Tensor, nn

import fastdiff
from fastdiff.models import AutoencoderKL, packs
from fastdiff.models.maps import laid_out
from fastdiff.models.rewrites import Rewrites, names

SMALL = {"norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 8}
TWO = {**SMALL, "block_out_channels": (16, 24)}
PLAIN = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
CROSSED = {**TWO, "cross_attention_dim": 12, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D")}
RESAMPLING = {"down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2}
VAE = {
    **{"block_out_channels": (16, 24), "norm_num_groups": 4},
    **{"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2},
}
Case = tuple[type[nn.Module], dict[str, Any], Callable[[int], tuple[Any, ...]]]
CASES: dict[str, Case] = {
    "gray": (
        diffusers.UNet2DModel,
        {**TWO, **PLAIN, "in_channels": 1, "out_channels": 1},
        lambda n: (normal(n, 1, 8, 6), 7),
    ),
    "centred gray": (
        diffusers.UNet2DModel,
        {**TWO, **PLAIN, "in_channels": 1, "out_channels": 2, "center_input_sample": True},
        lambda n: (normal(n, 1, 8, 6), 7),
    ),
    "one pixel in the middle": (diffusers.UNet2DModel, {**TWO, **PLAIN}, lambda n: (normal(n, 3, 2, 2), 7)),
    "one pixel, padded at the end": (
        diffusers.UNet2DModel,
        {**TWO, **PLAIN, "downsample_padding": 0},
        lambda n: (normal(n, 3, 2, 2), 7),
    ),
    "one pixel, resampled by blocks": (diffusers.UNet2DModel, {**TWO, **RESAMPLING}, lambda n: (normal(n, 3, 2, 2), 7)),
    "one row": (diffusers.UNet2DModel, {**TWO, **PLAIN}, lambda n: (normal(n, 3, 2, 10), 7)),
    "picture beside the maps": (
        diffusers.UNet2DModel,
        {
            **{**SMALL, "block_out_channels": (32, 64)},
            **{"down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D")},
            **{"up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"), "attention_head_dim": 16},
        },
        lambda n: (normal(n, 3, 2, 2), 7),
    ),
    "reflected": (
        diffusers.UNet2DConditionModel,
        {
            **{"block_out_channels": (32, 64), "layers_per_block": 2, "cross_attention_dim": 12},
            **{"norm_num_groups": None, "mid_block_type": None, "time_embedding_dim": 64, "attention_head_dim": 16},
            **{"down_block_types": ("KDownBlock2D",) * 2, "up_block_types": ("KUpBlock2D",) * 2},
        },
        lambda n: (normal(n, 4, 4, 6), 7, normal(n, 5, 12)),
    ),
    "gray with a hint": (
        diffusers.UNet2DConditionModel,
        {
            **{**CROSSED, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "in_channels": 5},
            **{"addition_embed_type": "image_hint", "encoder_hid_dim": 8, "encoder_hid_dim_type": "image_proj"},
        },
        lambda n: (
            *(normal(n, 1, 6, 4), 7, None),
            *(None, None, None, None, {"image_embeds": normal(n, 8), "hint": normal(n, 3, 48, 32)}),
        ),
    ),
    "gray picture to go by": (
        diffusers.ControlNetModel,
        {**CROSSED, "conditioning_channels": 1, "conditioning_embedding_out_channels": (4, 6), "in_channels": 1},
        lambda n: (normal(n, 1, 6, 4), 7, normal(n, 5, 12), normal(n, 1, 12, 8)),
    ),
    "gray autoencoder": (
        diffusers.AutoencoderKL,
        {**VAE, "in_channels": 1, "out_channels": 1, "latent_channels": 1},
        lambda n: (normal(n, 1, 8, 6),),
    ),
    "autoencoder of one latent pixel": (diffusers.AutoencoderKL, VAE, lambda n: (normal(n, 3, 2, 2),)),
}
LATER = [name for name in names() if name != "text_cache"]
"""All but that what is made once for a run is not worth a copy of the weights."""


def network(name: str) -> Any:
    """Every parameter random, so that nothing is zero."""
    kind, config, _ = CASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = kind(**config).eval().requires_grad_(False)
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.5, 0.3)
            elif not parameter.any():
                parameter.normal_(0.0, 0.2)
    return made


@dataclass(frozen=True)
class Convolved:
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    taps: tuple[int, ...]
    grouped: bool

    @property
    def lies_channels_last(self) -> bool:
        """By the strides, which PyTorch goes by where a size of 1 leaves it open. Those of the samples say nothing."""
        return self.strides[1:] == (1, self.shape[1] * self.shape[3], self.shape[1])


def convolved(monkeypatch: pytest.MonkeyPatch) -> list[Convolved]:
    """The maps that PyTorch convolves: our products are not among them."""
    seen: list[Convolved] = []
    plain = torch.nn.functional.conv2d

    def conv2d(x: Tensor, weight: Tensor, *others: Any, **more: Any) -> Tensor:
        seen.append(Convolved(tuple(x.shape), x.stride(), tuple(weight.shape[2:]), x.shape[1] > weight.shape[1]))
        return plain(x, weight, *others, **more)

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)
    return seen


def cast(values: Any, dtype: torch.dtype) -> Any:
    if isinstance(values, dict):
        return {name: cast(value, dtype) for name, value in values.items()}
    if isinstance(values, tuple):
        return tuple(cast(value, dtype) for value in values)
    return values.to(dtype) if isinstance(values, Tensor) else values


@torch.no_grad()
def output(made: nn.Module, given: tuple[Any, ...]) -> Tensor:
    result = made(*given, return_dict=False)
    if isinstance(made, diffusers.ControlNetModel):
        return torch.cat([each.flatten() for each in (*result[0], result[1])])
    return result[0]


@pytest.mark.parametrize("samples", [1, 2], ids=["one", "two"])
@pytest.mark.parametrize("name", CASES)
def test_every_map_that_is_convolved_lies_channels_last(
    name: str, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, which is left to PyTorch's convolutions as all is on a GPU."""
    made, given = network(name).double(), cast(CASES[name][2](samples), torch.float64)
    expected = output(made, given)
    fastdiff.accelerate(made, strict=True)
    seen = convolved(monkeypatch)
    actual = output(made, given)
    assert torch.allclose(actual, expected, rtol=1e-9, atol=1e-10)
    # An autoencoder's 1x1 convolutions before and after all others lie as the caller has it.
    looked_at = [each for each in seen if max(each.taps) > 1 and max(each.shape[2:]) > 1]
    assert len(looked_at) > 5
    assert [each for each in looked_at if not each.lies_channels_last] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("samples", [1, 2], ids=["one", "two"])
@pytest.mark.parametrize("name", CASES)
def test_every_convolution_is_ours(
    name: str, samples: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = network(name).to(dtype)
    given = cast(CASES[name][2](samples), dtype)
    usual, truth = output(plain, given), output(copy.deepcopy(plain).double(), cast(given, torch.float64))
    # In layers as small as these, filled up to whole vectors, copies are larger than the weights.
    monkeypatch.setattr(packs, "_MARGIN", 2**26)
    made = fastdiff.accelerate(plain, strict=True, rewrites=LATER)
    seen = convolved(monkeypatch)
    actual = output(made, given)
    # The library itself calls an autoencoder's 1x1 convolutions before and after all others.
    outside = made.config.latent_channels if isinstance(made, diffusers.AutoencoderKL) else 0
    left = [each for each in seen if not (each.grouped or (each.taps == (1, 1) and each.shape[1] <= 2 * outside))]
    assert left == []
    assert_close_to_truth(actual, truth, usual)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("samples", [1, 2], ids=["one", "two"])
@pytest.mark.parametrize("name", ["gray autoencoder", "autoencoder of one latent pixel"])
def test_an_autoencoders_first_and_last_convolutions_are_ours_too(
    name: str, samples: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = network(name).to(dtype)
    made = AutoencoderKL(**plain.config).eval().requires_grad_(False).to(dtype)
    made.load_state_dict(plain.state_dict())
    (given,) = cast(CASES[name][2](samples), dtype)
    usual, truth = output(plain, (given,)), output(plain.double(), (given.double(),))
    seen = convolved(monkeypatch)
    with torch.no_grad():
        actual = made(given)
    assert seen == []
    assert_close_to_truth(actual, truth, usual)


@pytest.mark.parametrize("shape", [(1, 1, 5, 4), (2, 1, 4, 3), (3, 8, 1, 1), (1, 8, 1, 1), (1, 2, 1, 3), (2, 3, 4, 5)])
def test_a_layout_is_one_that_pytorch_follows(shape: tuple[int, int, int, int]) -> None:
    for x in (normal(*shape), normal(*shape).contiguous(memory_format=torch.channels_last)):
        y = laid_out(x, Rewrites())
        assert Convolved(tuple(y.shape), y.stride(), (1, 1), grouped=False).lies_channels_last
        assert torch.equal(y, x)
        assert laid_out(x, Rewrites.none()) is x
