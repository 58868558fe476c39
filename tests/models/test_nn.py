"""The fused layers as modules: parameters of the usual names, results of the plain layers."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.activations import GEGLU as LibraryGEGLU
from diffusers.models.attention_processor import Attention as LibraryAttention
from inputs import DTYPES, LAYOUTS, normal
from tolerance import assert_close_to_truth
from torch import nn
from torch.nn import functional as F

from fastdiff import InputError
from fastdiff.nn import GEGLU, Attention, GroupNormSiLU


def randomize(module: nn.Module) -> nn.Module:
    for index, parameter in enumerate(module.requires_grad_(False).parameters()):
        parameter.copy_(normal(*parameter.shape, seed=index) / parameter.shape[-1] ** 0.5)
    return module


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [True, False], ids=["silu", "no-silu"])
def test_group_norm_silu(dtype, layout, silu):
    plain = randomize(nn.GroupNorm(4, 24, eps=1e-3))
    fused = GroupNormSiLU(4, 24, eps=1e-3, silu=silu)
    fused.load_state_dict(plain.state_dict())

    def add(x: torch.Tensor, addend: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return x + addend[:, :, None, None] + residual

    def apply(*values: torch.Tensor) -> torch.Tensor:
        y = plain.to(values[0].dtype)(add(*values))
        return F.silu(y) if silu else y

    x, addend, residual = normal(2, 24, 5, 7, seed=1), normal(2, 24, seed=2), normal(2, 24, 5, 7, seed=3)
    arguments = [value.to(DTYPES[dtype]) for value in (x, addend, residual)]
    wide = [value.double() for value in arguments]
    with torch.no_grad():
        h = arguments[0].to(memory_format=LAYOUTS[layout])
        actual, total = fused(h, addend=arguments[1], residual=arguments[2], return_sum=True)
        assert_close_to_truth(actual, apply(*wide), apply(*arguments))
    assert actual.is_contiguous(memory_format=LAYOUTS[layout])
    assert_close_to_truth(total, add(*wide), add(*arguments))


def test_group_norm_silu_refuses_groups_that_do_not_divide():
    with pytest.raises(InputError, match="channels=30 is not divisible by groups=8"):
        GroupNormSiLU(8, 30)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("crossed", [False, True], ids=["self", "cross"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_attention(dtype, crossed, masked):
    library = randomize(LibraryAttention(32, 20 if crossed else None, heads=4, dim_head=10, bias=True))
    ours = Attention(32, heads=4, head_dim=10, context_channels=20 if crossed else None, bias=True).requires_grad_(
        False
    )
    ours.load_state_dict(library.state_dict())
    x, context = normal(2, 9, 32, seed=1), normal(2, 5, 20, seed=2) if crossed else None
    bias = normal(2, 1, 5 if crossed else 9, seed=3) if masked else None

    def theirs(precision: torch.dtype) -> torch.Tensor:
        tokens, source, mask = (None if value is None else value.to(precision) for value in (x, context, bias))
        return library.to(precision)(tokens, encoder_hidden_states=source, attention_mask=mask)

    tokens, source, mask = (None if value is None else value.to(DTYPES[dtype]) for value in (x, context, bias))
    actual = ours.to(DTYPES[dtype])(tokens, source, mask if mask is None else mask[:, None])
    assert_close_to_truth(actual, theirs(torch.float64), theirs(DTYPES[dtype]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_geglu(dtype):
    library = randomize(LibraryGEGLU(12, 20))
    ours = GEGLU(12, 20).requires_grad_(False)
    ours.load_state_dict(library.state_dict())
    x = normal(3, 4, 12)
    actual = ours.to(DTYPES[dtype])(x.to(DTYPES[dtype]))
    plain = library.to(DTYPES[dtype])(x.to(DTYPES[dtype]))
    truth = randomize(LibraryGEGLU(12, 20)).double()(x.double())
    assert_close_to_truth(actual, truth, plain)
