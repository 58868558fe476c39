"""Calls of single blocks that run as before: the report says of each why, unless everybody expects it."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from inputs import normal
from torch import Tensor, nn

import fastdiff

IMAGE, TOKENS = normal(2, 32, 8, 6, seed=1), normal(2, 10, 32, seed=3)
ARGUMENTS = "it was called with arguments that fastdiff's block does not take"


class Holder(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block.eval().requires_grad_(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


def resnet(**options: Any) -> nn.Module:
    return ResnetBlock2D(in_channels=32, groups=8, **{"temb_channels": None, **options})


def chunked() -> nn.Module:
    block = BasicTransformerBlock(32, 4, 8)
    block.set_chunk_feed_forward(5, 1)
    return block


def sequential() -> nn.Module:
    return nn.Sequential(nn.GroupNorm(8, 32), nn.SiLU())


NO_TIME = {"temb": None}
LEFT: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], str]] = {
    "a time as a map": (resnet, (IMAGE,), {"temb": normal(2, 32, 1, 1)}, ARGUMENTS),
    "a size that is not doubled": (
        lambda: Upsample2D(32, use_conv=True),
        (IMAGE, (15, 11)),
        {},
        "an Upsample2D was asked for a size that is not twice its input's",
    ),
    "wide heads": (
        lambda: Attention(288, heads=1, dim_head=288),
        (normal(1, 4, 288),),
        {},
        "an Attention has heads of more than 256 channels",
    ),
    "chunks": (chunked, (TOKENS,), {}, "a BasicTransformerBlock feeds forward in chunks"),
    "float64": (lambda: resnet().double(), (IMAGE.double(),), NO_TIME, "its input is torch.float64"),
    "an empty batch": (resnet, (IMAGE[:0],), NO_TIME, "its input is empty"),
    "a float64 Sequential": (lambda: sequential().double(), (IMAGE.double(),), {}, "its input is torch.float64"),
}


def run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return module(*args, **kwargs)


@pytest.mark.parametrize(("make", "args", "kwargs", "reason"), LEFT.values(), ids=LEFT)
def test_a_call_that_runs_as_before_is_listed(
    make: Any, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str
) -> None:
    module = Holder(make())
    expected = run(copy.deepcopy(module), args, kwargs)
    fastdiff.accelerate(module)
    fastdiff.report(reset=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            found = run(module, args, kwargs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    left = fastdiff.report(reset=True).left
    assert {(said, calls) for (_, said), calls in left.items()} == {(reason, 2)}
    assert [reason in str(each.message) for each in caught] == [True]


def test_a_replaced_class_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fastdiff.accelerate(Holder(GEGLU(32, 16)))
    monkeypatch.setattr(GEGLU, "forward", lambda self, x: x + 1)
    fastdiff.report(reset=True)
    with pytest.warns(UserWarning, match="the forward of GEGLU was replaced"):
        assert torch.equal(module(TOKENS), TOKENS + 1)
    assert [reason for _, reason in fastdiff.report(reset=True).left] == ["the forward of GEGLU was replaced"]


def test_what_the_library_refuses_is_not_listed() -> None:
    module = fastdiff.accelerate(Holder(resnet()))
    fastdiff.report(reset=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError), torch.no_grad():
            module(normal(2, 16, 8, 6), None)
    assert fastdiff.report(reset=True).left == {}


@pytest.mark.parametrize(
    "make", [resnet, lambda: Upsample2D(32, use_conv=True), sequential], ids=["resnet", "upsample", "sequential"]
)
def test_a_rewrite_that_is_off_and_gradients_are_not_listed(make: Any) -> None:
    args = (IMAGE, None) if make is resnet else (IMAGE,)
    off, trained = Holder(make()), Holder(make())
    fastdiff.accelerate(off, rewrites=["geglu"])
    fastdiff.accelerate(trained)
    trained.requires_grad_()
    fastdiff.report(reset=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        off(*args)
        trained(*args).sum().backward()
    assert fastdiff.report(reset=True).left == {}
