"""Accelerated networks of diffusers against the originals, on layouts and calls drawn from all that there are."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel
from random_adapters import Adapters, draw_adapters
from random_draws import Dice, Drawn
from random_layouts import again, cast, draw
from tolerance import relative_error
from torch import Tensor, nn

import fastdiff
from fastdiff.models.config import SUPPORTED_OF
from fastdiff.models.forward import Forward
from fastdiff.models.rewrites import names

SEEDS = range(190)


def outputs(network: nn.Module, arguments: dict[str, Any]) -> list[Tensor]:
    # The library takes the residuals within the blocks out of the list that it is given.
    given = {name: list(value) if isinstance(value, list) else value for name, value in arguments.items()}
    with torch.no_grad():
        return _tensors(network(**given))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value
    return [tensor for part in parts for tensor in _tensors(part)]


def rewrites(drawn: Drawn) -> list[str] | None:
    """All of them, or some."""
    dice = Dice(drawn.seed)
    return None if dice.chance(0.5) else [name for name in names() if dice.chance(0.6)]


def adapters(seed: int) -> Adapters | None:
    """Some networks have some."""
    dice = Dice(2000 + seed)
    return draw_adapters(dice) if dice.chance(0.3) else None


def refuse(_: Forward) -> None:
    raise AssertionError("the library's own code ran")


@pytest.mark.parametrize("seed", SEEDS)
def test_an_accelerated_network_gives_what_the_original_gives(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = draw(seed)
    calls = [drawn.arguments, *again(drawn)]
    original, adapted = drawn.network(), adapters(seed)
    late = adapted is not None and Dice(seed).chance(0.5)
    if adapted is not None and not late:
        adapted.put_into(original)
    network = fastdiff.accelerate(copy.deepcopy(original), rewrites=rewrites(drawn), strict=True)
    monkeypatch.setattr(Forward, "original", property(refuse))
    if adapted is not None and late:
        outputs(network, drawn.arguments)
        adapted.put_into(original)
        adapted.put_into(network)
    expected = [outputs(original, call) for call in calls]
    for call, truth in zip(calls, expected, strict=True):
        actual = outputs(network, call)
        assert [each.shape for each in actual] == [each.shape for each in truth]
        assert max(map(relative_error, actual, truth)) < (1e-10 if drawn.dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_is_that_of_the_dtype(dtype: torch.dtype) -> None:
    ours, theirs = [], []
    drawn_ones = [draw(seed) for seed in SEEDS[:: 9 if dtype == torch.float32 else 12]]
    for drawn in drawn_ones:
        if drawn.dtype != torch.float64:
            continue
        truth = outputs(drawn.network(), drawn.arguments)
        original = drawn.network().to(dtype)
        arguments = cast(drawn.arguments, dtype)
        for found, network in ((theirs, original), (ours, fastdiff.accelerate(copy.deepcopy(original), strict=True))):
            actual = outputs(network, arguments)
            assert all(each.dtype == dtype for each in actual)
            found += map(relative_error, actual, truth)
    assert _mean_square(ours) <= 2 * _mean_square(theirs) + torch.finfo(dtype).eps


def test_the_draws_have_adapters_and_masks() -> None:
    found = [each for each in map(adapters, SEEDS) if each is not None]
    assert {len(each.options) for each in found} == {1, 2}
    assert any(options["use_dora"] for each in found for options in each.options.values())
    masks = [draw(seed).arguments.get("attention_mask") for seed in SEEDS]
    assert {mask.dim() for mask in masks if mask is not None} == {2, 3}


def test_the_draws_have_every_block_and_embedding() -> None:
    drawn = [draw(seed) for seed in SEEDS]
    for kind in (UNet2DModel, UNet2DConditionModel):
        configs = [each.config for each in drawn if each.kind is kind]
        for key, values in SUPPORTED_OF[kind.__name__].items():
            found = {value for config in configs for value in _listed(config.get(key))}
            # The library's plain class has no configuration with which these two fit each other's maps.
            assert found >= set(values) - ({"KDownBlock2D", "KUpBlock2D"} if kind is UNet2DModel else set()), key
    assert sum(each.kind is ControlNetModel for each in drawn) > 20


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _mean_square(errors: list[float]) -> float:
    return math.sqrt(sum(error**2 for error in errors) / len(errors))
