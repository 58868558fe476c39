"""The fused layers made from the modules that they stand in for: the same parameters, the same results."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU as LibraryGEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention as LibraryAttention
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from inputs import normal
from tolerance import assert_close_to_truth
from torch import Tensor, nn

import fastdiff
from fastdiff import InputError
from fastdiff.nn import GEGLU, Attention, GroupNormSiLU


def randomize(module: nn.Module) -> nn.Module:
    for index, parameter in enumerate(module.requires_grad_(False).parameters()):
        parameter.copy_(normal(*parameter.shape, seed=index) / parameter.shape[-1] ** 0.5)
    return module.eval()


def assert_stands_in(ours: nn.Module, theirs: nn.Module, *inputs: Tensor | None, **more: Tensor) -> Tensor:
    """The same parameters under the same names, and results held to theirs in float64."""
    assert {name: id(value) for name, value in ours.state_dict(keep_vars=True).items()} == {
        name: id(value) for name, value in theirs.state_dict(keep_vars=True).items()
    }
    wide = [value if value is None else value.double() for value in inputs]
    truth = copy.deepcopy(theirs).double()(*wide, **{name: value.double() for name, value in more.items()})
    actual = ours(*inputs, **more)
    assert_close_to_truth(actual, truth, theirs(*inputs, **more))
    return actual


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("activation", [nn.SiLU(), None], ids=["silu", "no-silu"])
def test_group_norm_silu(affine, activation):
    norm = randomize(nn.GroupNorm(3, 12, eps=1e-3, affine=affine))
    fused = GroupNormSiLU.from_modules(norm, activation)
    assert fused.weight is norm.weight
    assert not fused.training
    theirs = nn.Sequential(norm, activation or nn.Identity())
    x = normal(2, 12, 5, 3, mean=4.0)
    assert_close_to_truth(fused(x), copy.deepcopy(theirs).double()(x.double()), theirs(x))
    assert f"12, eps=0.001, silu={activation is not None}" in repr(fused)


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ((nn.BatchNorm2d(4),), "norm is BatchNorm2d; expected torch.nn.GroupNorm"),
        ((None,), "norm is NoneType"),
        ((nn.GroupNorm(2, 4), nn.ReLU()), "activation is ReLU; expected torch.nn.SiLU"),
    ],
    ids=["norm", "no-norm", "activation"],
)
def test_group_norm_silu_takes_no_other_modules(modules, message):
    with pytest.raises(InputError, match=message):
        GroupNormSiLU.from_modules(*modules)


OPTIONS = {
    "self": {"heads": 3, "dim_head": 8},
    "cross-bias": {"heads": 2, "dim_head": 40, "cross_attention_dim": 20, "bias": True},
    "upcast-no-out-bias": {
        "heads": 1,
        "dim_head": 80,
        "upcast_attention": True,
        "upcast_softmax": True,
        "out_bias": False,
    },
    "old-processor-unscaled": {"heads": 4, "dim_head": 8, "scale_qk": False, "processor": AttnProcessor()},
    "dropout": {"heads": 4, "dim_head": 8, "dropout": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention(options):
    library = randomize(LibraryAttention(24, **options))
    ours = Attention.from_attention(library)
    x = normal(3, 7, 24, seed=1)
    source = normal(3, 5, 20, seed=2) if library.is_cross_attention else None
    plain = assert_stands_in(ours, library, x, source)
    mask = torch.where(normal(3, 5 if source is not None else 7) > 0, 0.0, -1e4)
    for form in (mask[:, None], mask[:, None].repeat_interleave(ours.heads, 0)):
        masked = assert_stands_in(ours, library, x, source, attention_mask=form)
        assert not torch.allclose(masked, plain)
        assert torch.equal(ours(x, source, mask), masked)


def test_attention_in_a_block_of_the_library():
    block = randomize(BasicTransformerBlock(24, 3, 8, cross_attention_dim=20))
    x, tokens = normal(2, 7, 24, seed=1), normal(2, 5, 20, seed=2)
    mask = torch.where(normal(2, 1, 5) > 0, 0.0, -1e4)

    def call(precision: torch.dtype) -> Tensor:
        values = [value.to(precision) for value in (x, tokens, mask)]
        module = copy.deepcopy(block).to(precision)
        return module(values[0], encoder_hidden_states=values[1], encoder_attention_mask=values[2])

    truth, plain = call(torch.float64), call(torch.float32)
    names = list(block.state_dict())
    block.attn1, block.attn2 = map(Attention.from_attention, (block.attn1, block.attn2))
    block.ff.net[0] = GEGLU.from_module(block.ff.net[0])
    assert list(block.state_dict()) == names
    assert_close_to_truth(call(torch.float32), truth, plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_num_groups": 3}, "group_norm is GroupNorm; expected None"),
        ({"residual_connection": True}, "residual_connection is True; expected False"),
        ({"rescale_output_factor": 2.0}, "rescale_output_factor is 2.0; expected 1.0"),
        ({"qk_norm": "layer_norm"}, "norm_q is LayerNorm"),
        ({"cross_attention_norm": "layer_norm"}, "norm_cross is LayerNorm"),
        ({"added_kv_proj_dim": 24}, "added_kv_proj_dim is 24"),
        ({"is_causal": True}, "is_causal is True"),
        ({"kv_heads": 1}, r"give \[24, 8, 8\] channels"),
        ({"processor": SlicedAttnProcessor(1)}, "the processor is SlicedAttnProcessor"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_attention_names_what_it_does_not_take(options, message):
    with pytest.raises(InputError, match=message):
        Attention.from_attention(LibraryAttention(24, heads=3, dim_head=8, **options))


def test_attention_needs_the_parts_of_an_attention():
    with pytest.raises(InputError, match="module is Linear, without to_q"):
        Attention.from_attention(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"hidden_states has shape \(2, 8, 3, 3\)"):
        Attention(8, heads=2, head_dim=4)(normal(2, 8, 3, 3))


def test_geglu():
    library = randomize(LibraryGEGLU(10, 14))
    assert_stands_in(GEGLU.from_module(library), library, normal(2, 3, 10))
    for other in (nn.Linear(2, 2), nn.GELU()):
        with pytest.raises(InputError, match=f"module is {type(other).__name__}; expected a GEGLU"):
            GEGLU.from_module(other)


class Foreign(nn.Module):
    """A U-Net of somebody else's, small: norms and activations apart, an attention of diffusers, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.norm, self.act = nn.GroupNorm(3, 12), nn.SiLU()
        self.attention = LibraryAttention(12, 20, heads=2, dim_head=6, bias=True)
        self.gate = LibraryGEGLU(12, 8)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        h = self.act(self.norm(self.conv(x)))
        tokens = h.flatten(2).transpose(1, 2)
        return self.gate(tokens + self.attention(tokens, encoder_hidden_states=text, attention_mask=mask))


def test_a_foreign_network_with_layers_of_ours_loads_its_state_dict_and_trains() -> None:
    torch.manual_seed(0)
    theirs, ours = Foreign(), Foreign()
    ours.norm, ours.act = GroupNormSiLU(3, 12), nn.Identity()
    ours.attention = Attention(12, heads=2, head_dim=6, context_channels=20, bias=True)
    ours.gate = GEGLU(12, 8)
    ours.load_state_dict(theirs.state_dict())
    mask = torch.where(normal(2, 1, 5, seed=2) > 0, 0.0, -1e4)
    inputs = (normal(2, 3, 4, 4), normal(2, 5, 20, seed=1), mask)
    wide = copy.deepcopy(theirs).double()(*(value.double() for value in inputs))
    with torch.no_grad():
        assert_close_to_truth(ours(*inputs), wide, theirs(*inputs))
    gradients = []
    for network in (theirs, ours):
        network(*inputs).square().sum().backward()
        gradients.append({name: value.grad for name, value in network.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        error = torch.linalg.vector_norm(gradients[1][name] - expected)
        assert error <= 1e-5 * torch.linalg.vector_norm(expected) + 1e-5, name
    with fastdiff.use_backend("native"), pytest.raises(InputError, match="requires grad"):
        ours(*inputs)


def test_constructors_take_device_dtype_and_what_to_leave_out() -> None:
    options = {"device": "meta", "dtype": torch.bfloat16}
    for made in (
        GroupNormSiLU(2, 4, **options),
        Attention(4, heads=2, head_dim=2, context_channels=6, bias=True, **options),
        GEGLU(4, 6, **options),
    ):
        assert {(value.device.type, value.dtype) for value in made.parameters()} == {("meta", torch.bfloat16)}
    assert not GroupNormSiLU(2, 4, affine=False).state_dict()
    assert list(GEGLU(4, 6, bias=False).state_dict()) == ["proj.weight"]
    x = normal(2, 4, 3)
    plain = nn.functional.silu(nn.functional.group_norm(x, 2))
    assert torch.allclose(GroupNormSiLU(2, 4, affine=False)(x), plain, rtol=1e-5, atol=1e-6)
