"""Winograd's filtering as a rewrite of its own: it can be turned off alone, and the function stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fastdiff
from fastdiff.models import prepacked
from fastdiff.models.packs import Packs, extension, widens
from fastdiff.models.processor import this
from fastdiff.models.rewrites import Rewrites, names, needed

diffusers = pytest.importorskip("diffusers")

OFF = tuple(name for name in names() if name != "winograd")


class Spy:
    """The extension, and the names of what was asked of it."""

    def __init__(self, called: set[str]) -> None:
        self.called, self.real = called, extension()

    def __getattr__(self, name: str) -> Any:
        self.called.add(name)
        return getattr(self.real, name)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    names: set[str] = set()
    spy = Spy(names)
    monkeypatch.setattr(prepacked, "extension", lambda: None if spy.real is None else spy)
    return names


def network() -> Any:
    """With a doubled map, 1x1 convolutions and one of stride 2."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(64, 128), layers_per_block=1, **blocks
    ).requires_grad_(False)


def error(y: torch.Tensor, truth: torch.Tensor) -> float:
    return ((y.double() - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_output_stays(dtype: torch.dtype, called: set[str]) -> None:
    model = network().to(dtype)
    x = torch.randn(2, 3, 16, 16).to(dtype)
    truth = copy.deepcopy(model).double()(x.double(), 7).sample
    eager = error(model(x, 7).sample, truth)
    outputs, filtered = [], []
    for rewrites in (None, OFF, ["winograd"], None):
        called.clear()
        fastdiff.accelerate(model, strict=True, rewrites=rewrites)
        outputs.append(model(x, 7).sample)
        filtered.append(any("winograd" in name for name in called))
    assert max(error(y, truth) for y in outputs) <= 2 * eager + torch.finfo(dtype).eps
    has_it = widens(dtype) or this().filtered
    assert filtered == [has_it, False, False, has_it], "without `prepacked` there is none either"
    assert torch.equal(outputs[0], outputs[3])
    assert torch.equal(outputs[0], outputs[1]) != has_it


def test_a_network_of_ours_switches_and_keeps_one_copy(called: set[str]) -> None:
    if extension() is None:
        pytest.skip("needs the compiled extension")
    ours = fastdiff.models.UNet(**network().config)
    ours.requires_grad_(False)
    x, sizes = torch.randn(1, 3, 16, 16), []
    for rewrites in (Rewrites(), Rewrites.parse(OFF), Rewrites()):
        ours.rewrites = rewrites
        called.clear()
        ours(x, 7)
        assert any("winograd" in name for name in called) == rewrites.winograd
        sizes.append(sum(getattr(value, "nbytes", 0) for value in ours.packs.values()))
    assert sizes[0] == sizes[2]
    assert 0 < sizes[1] < 2 * sizes[0]


def test_what_was_laid_out_for_the_other_way_goes() -> None:
    packs, layer, x = Packs(), torch.nn.Linear(4, 4).requires_grad_(False), torch.ones(2, 1, 4)
    assert packs.ready(x, Rewrites(), layer) is packs
    packs.get("key", [x], lambda: 1)
    packs.ready(x, Rewrites(), layer)
    assert packs.values() == [1]
    packs.ready(x, Rewrites.parse(OFF), layer)
    assert (packs.winograd, packs.values()) == (False, [])


def test_what_each_rewrite_needs() -> None:
    assert needed("winograd") == ("channels_last", "prepacked")
    assert needed("qkv") == ()
    for name in names():
        assert set(needed(name)) < set(names()) - {name}
