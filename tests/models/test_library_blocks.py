"""Building blocks of diffusers in networks that fastdiff has none of its own for."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from diffusers import UNet3DConditionModel, UNetMotionModel, VQModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnProcessor, SlicedAttnProcessor
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from inputs import normal
from peft import LoraConfig, inject_adapter_in_model
from tolerance import assert_close_to_truth
from torch import Tensor, nn

import fastdiff
from fastdiff.errors import InputError


class Holder(nn.Module):
    """A foreign network around one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


def made(module: nn.Module) -> nn.Module:
    for seed, parameter in enumerate(module.requires_grad_(False).parameters()):
        parameter.copy_(0.3 * normal(*parameter.shape, seed=seed))
    return module.eval()


def cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def called(module: nn.Module, given: dict[str, Any], dtype: torch.dtype) -> Tensor:
    fastdiff.report(reset=True)
    with torch.no_grad():
        return module(**{name: cast(value, dtype) for name, value in given.items()})


def ran() -> dict[str, int]:
    return {name: count for (name, _), count in fastdiff.report().calls.items()}


def check(block: nn.Module, given: dict[str, Any], expected: dict[str, int], dtype: torch.dtype) -> None:
    module = Holder(made(block)).to(dtype)
    plain = called(module, given, dtype)
    truth = called(copy.deepcopy(module).double(), given, torch.float64)
    fastdiff.accelerate(module, strict=True)
    assert_close_to_truth(called(module, given, dtype), truth, plain)
    assert ran() == expected
    assert fastdiff.report().left == {}
    fastdiff.restore(module)
    assert torch.equal(called(module, given, dtype), plain)
    assert ran() == {}


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
IMAGE, TIME = normal(2, 32, 8, 6, seed=1), normal(2, 16, seed=2)
TOKENS, TEXT = normal(2, 10, 32, seed=3), normal(2, 5, 20, seed=4)
MASK = torch.zeros(2, 1, 5)
MASK[0, :, 3:] = -1e4

RESNETS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "plain": ({}, {}),
    "wider": ({"out_channels": 64}, {}),
    "up": ({"up": True}, {"upsample_conv": 1}),
    "down": ({"down": True}, {}),
    "up by fir": ({"up": True, "kernel": "fir"}, {}),
    "down by pooling": ({"down": True, "kernel": "sde_vp"}, {}),
    "scale and shift": ({"time_embedding_norm": "scale_shift"}, {}),
    "scaled": ({"skip_time_act": True, "output_scale_factor": 1.5}, {}),
    "other groups": ({"groups_out": 4, "conv_2d_out_channels": 48}, {}),
    "no time": ({"temb_channels": None}, {}),
    "of a decoder": ({"temb_channels": None, "time_embedding_norm": "group"}, {}),
}


@DTYPES
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(("options", "more"), RESNETS.values(), ids=RESNETS)
def test_resnet(options: dict[str, Any], more: dict[str, int], layout: torch.memory_format, dtype: torch.dtype) -> None:
    block = ResnetBlock2D(in_channels=32, groups=8, **{"temb_channels": 16, **options})
    given = {"input_tensor": IMAGE.contiguous(memory_format=layout)}
    given["temb"] = None if block.time_emb_proj is None else TIME
    check(block, given, {"group_norm_silu": 2, "conv_bias_residual": 1} | more, dtype)


def test_a_block_s_sum_is_left_where_its_rewrite_is_off() -> None:
    block = made(ResnetBlock2D(in_channels=32, groups=8, temb_channels=None))
    fastdiff.accelerate(block, rewrites=["group_norm_silu"])
    called(block, {"input_tensor": IMAGE, "temb": None}, torch.float32)
    assert ran() == {"group_norm_silu": 2}


ATTENTIONS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 0),
    "image": ({"norm_num_groups": 8, "residual_connection": True, "rescale_output_factor": 2.0, "bias": True}, 1),
    "old": ({"processor": AttnProcessor()}, 0),
    "unscaled": ({"scale_qk": False}, 0),
    "normed queries": ({"qk_norm": "layer_norm"}, 0),
    "normed text": ({"cross_attention_norm": "layer_norm"}, 0),
    "dropout": ({"dropout": 0.5}, 0),
}


@DTYPES
@pytest.mark.parametrize("kind", ["image", "text", "masked", "mask of every query"])
@pytest.mark.parametrize(("options", "norms"), ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention(options: dict[str, Any], norms: int, kind: str, dtype: torch.dtype) -> None:
    given: dict[str, Any] = {"hidden_states": IMAGE}
    if kind != "image":
        given = {"hidden_states": TOKENS, "encoder_hidden_states": TEXT}
        options = {"cross_attention_dim": 20} | options
    if "mask" in kind:
        given["attention_mask"] = MASK if kind == "masked" else MASK.expand(2, 10, 5)
    block = Attention(32, heads=4, dim_head=8, **options)
    check(block, given, {"attention": 1} | ({"group_norm_silu": 1} if norms else {}), dtype)


BLOCKS: dict[str, tuple[dict[str, Any], int, int]] = {
    "text": ({"cross_attention_dim": 20}, 2, 1),
    "image": ({}, 1, 1),
    "image twice": ({"double_self_attention": True}, 2, 1),
    "text twice": ({"cross_attention_dim": 20, "only_cross_attention": True}, 2, 1),
    "places": ({"positional_embeddings": "sinusoidal", "num_positional_embeddings": 32}, 1, 1),
    "norms without weights": ({"norm_elementwise_affine": False}, 1, 1),
    "plain feed-forward": ({"activation_fn": "gelu"}, 1, 0),
}


@DTYPES
@pytest.mark.parametrize(("options", "attentions", "gates"), BLOCKS.values(), ids=BLOCKS)
def test_transformer_block(options: dict[str, Any], attentions: int, gates: int, dtype: torch.dtype) -> None:
    given = {"hidden_states": TOKENS}
    if "cross_attention_dim" in options:
        given["encoder_hidden_states"] = TEXT
    expected = {"attention": attentions, "layer_norm_modulate": attentions, "geglu": gates}
    block = BasicTransformerBlock(32, 4, 8, **options)
    check(block, given, {name: count for name, count in expected.items() if count}, dtype)


UPSAMPLES = {"conv": ({}, None), "other name": ({"name": "Conv2d_0", "out_channels": 8}, None), "size": ({}, (16, 12))}


@DTYPES
@pytest.mark.parametrize(("options", "size"), UPSAMPLES.values(), ids=UPSAMPLES)
def test_upsample(options: dict[str, Any], size: Any, dtype: torch.dtype) -> None:
    given = {"hidden_states": IMAGE, "output_size": size}
    check(Upsample2D(32, use_conv=True, **options), given, {"upsample_conv": 1}, dtype)


def unaffected(module: nn.Module, given: dict[str, Any], reason: str | None) -> None:
    """The calls of an accelerated module are its own, and the report says why."""
    expected = called(fastdiff.restore(copy.deepcopy(module)), given, torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert torch.equal(called(module, given, torch.float32), expected)
    assert ran() == {}
    said = [text for _, text in fastdiff.report().left]
    assert said == [] if reason is None else [text for text in said if reason in text]
    assert reason is None or any(reason in str(each.message) for each in caught)


def resnet() -> tuple[Any, dict[str, Any]]:
    block = ResnetBlock2D(in_channels=32, groups=8, temb_channels=16)
    return fastdiff.accelerate(Holder(made(block))), {"input_tensor": IMAGE, "temb": TIME}


def test_an_activation_or_a_hook_in_between_is_seen() -> None:
    module, given = resnet()
    module.block.nonlinearity = nn.Mish()
    unaffected(module, given, "another activation or norm")
    module, given = resnet()
    module.block.norm2.register_forward_hook(lambda module, args, out: 2 * out)
    unaffected(module, given, "or a hook on them")


def test_a_replaced_forward_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    module, given = resnet()
    monkeypatch.setattr(ResnetBlock2D, "forward", lambda self, input_tensor, temb: input_tensor + 1)
    unaffected(module, given, "the forward of ResnetBlock2D was replaced")


def test_another_way_of_attending_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fastdiff.accelerate(Holder(made(Attention(32, heads=4, dim_head=8))))
    given = {"hidden_states": TOKENS}
    module.block.set_processor(SlicedAttnProcessor(1))
    unaffected(module, given, "the processor SlicedAttnProcessor")
    module.block.set_processor(type("AttnProcessor", (AttnProcessor,), {})())
    unaffected(module, given, "the processor AttnProcessor")
    module.block.set_processor(AttnProcessor())
    called(module, given, torch.float32)
    assert ran() == {"attention": 1}
    own = Attention.get_attention_scores
    monkeypatch.setattr(Attention, "get_attention_scores", lambda self, q, k, mask=None: own(self, q, k, mask).flip(1))
    unaffected(module, given, "a method of an Attention was replaced")


def test_arguments_of_other_uses_are_the_librarys() -> None:
    block = made(BasicTransformerBlock(32, 4, 8))
    module = fastdiff.accelerate(Holder(block), rewrites=["add_layer_norm"])
    block.set_chunk_feed_forward(5, 1)
    expected = called(fastdiff.restore(copy.deepcopy(module)), {"hidden_states": TOKENS}, torch.float32)
    actual = called(module, {"hidden_states": TOKENS}, torch.float32)
    assert torch.linalg.vector_norm(actual - expected) <= 1e-5 * torch.linalg.vector_norm(expected)
    assert ran() == {"attention": 1}
    geglu = fastdiff.accelerate(Holder(made(GEGLU(32, 16))))
    with torch.no_grad():
        assert geglu(normal(3, 2, 32)).shape == (3, 2, 16)
        with pytest.raises(TypeError, match="hidden_states"):
            geglu()


def test_gradients_are_the_librarys() -> None:
    module, given = resnet()
    plain = fastdiff.restore(copy.deepcopy(module))
    results = []
    for each in (module, plain):
        each.block.conv2.weight.requires_grad_()
        each(**given).sum().backward()
        results.append(each.block.conv2.weight.grad)
    assert torch.equal(*results)


def test_lora_takes_effect() -> None:
    module, given = resnet()
    before = called(module, given, torch.float32)
    config = LoraConfig(r=2, target_modules=["conv1", "conv2", "time_emb_proj"], init_lora_weights=False)
    inject_adapter_in_model(config, module)
    expected = called(fastdiff.restore(copy.deepcopy(module)), given, torch.float32)
    actual = called(module, given, torch.float32)
    assert torch.linalg.vector_norm(actual - expected) <= 1e-5 * torch.linalg.vector_norm(expected)
    assert not torch.allclose(actual, before)
    assert ran() == {"group_norm_silu": 2}


SMALL = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
VIDEO = {"cross_attention_dim": 12, "in_channels": 4, "out_channels": 4}
CROSSED = {
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
}
CROSSED_3D = {
    "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
    "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
}
NETWORKS = {
    "motion": lambda: UNetMotionModel(
        **SMALL, **VIDEO, **CROSSED, num_attention_heads=2, motion_num_attention_heads=2, motion_max_seq_length=4
    ),
    "3d": lambda: UNet3DConditionModel(**SMALL, **VIDEO, **CROSSED_3D, attention_head_dim=4),
    "vq": lambda: VQModel(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=9,
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_whole_networks(name: str) -> None:
    torch.manual_seed(0)
    network: Any = NETWORKS[name]().eval().requires_grad_(False)
    if name == "vq":
        given: dict[str, Any] = {"sample": normal(1, 3, 8, 8)}
    else:
        texts = 3 if name == "motion" else 1
        given = {"sample": normal(1, 4, 3, 8, 8), "timestep": 7, "encoder_hidden_states": normal(texts, 5, 12, seed=1)}
    expected = called(network, given, torch.float32).sample
    keys = list(network.state_dict())
    with pytest.raises(InputError, match="no network for"):
        fastdiff.accelerate(network, strict=True)
    with pytest.warns(UserWarning, match="blocks inside it are accelerated"):
        fastdiff.accelerate(network)
    actual = called(network, given, torch.float32).sample
    assert torch.linalg.vector_norm(actual - expected) <= 1e-5 * torch.linalg.vector_norm(expected)
    assert {"group_norm_silu", "upsample_conv", "attention"} <= ran().keys()
    assert list(network.state_dict()) == keys
    assert any(each.startswith(f"{type(network).__name__}: ResnetBlock2D") for each in fastdiff.report().networks)
    assert torch.equal(called(copy.deepcopy(network), given, torch.float32).sample, actual)
    fastdiff.restore(network)
    assert torch.equal(called(network, given, torch.float32).sample, expected)
    assert ran() == {}
