"""The exact rewrites of attention: each leaves the output as it is, and sees what is done to the layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from counting import Counter
from inputs import normal
from tolerance import assert_close_to_truth, relative_error
from torch import Tensor, nn

from fastdiff.models.attention import SpatialAttention
from fastdiff.models.context import Context
from fastdiff.models.maps import Sum, total
from fastdiff.models.rewrites import Rewrites
from fastdiff.models.transformer import Transformer

REWRITES = ("unit_scale", "group_norm_silu", "geglu", "add_layer_norm", "text_cache", "folded_residual", "qkv")
BIT = ("unit_scale", "text_cache")
"""Those that leave every rounding as it was."""
CHOICES = {**{name: Rewrites.parse([name]) for name in REWRITES}, "all": Rewrites()}


@dataclass(frozen=True)
class Layout:
    """A block with random weights, its feature map, and what it reads besides."""

    module: Callable[[], nn.Module]
    shape: tuple[int, ...]
    text: tuple[int, int] = (7, 20)
    masks: bool = False

    def build(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        module = self.module().requires_grad_(False).eval()
        for index, (name, value) in enumerate(module.named_parameters()):
            noise = normal(*value.shape, seed=index)
            value.copy_(noise / value[0].numel() ** 0.5 if value.dim() > 1 else noise * 0.3 + ("norm" in name))
        return module.to(dtype)

    def inputs(self, dtype: torch.dtype = torch.float32) -> tuple[Any, Context]:
        """A sum still to be made, as a residual block gives it, and a context without rewrites."""
        x, more = (normal(*self.shape, seed=seed, mean=1.0).to(dtype) for seed in (1, 2))
        x, more = (value.contiguous(memory_format=torch.channels_last) for value in (x, more))
        pixels, (words, width) = self.shape[2] * self.shape[3], self.text
        context = Context(Rewrites.none(), tokens=normal(self.shape[0], words, width, seed=3).to(dtype))
        if self.masks:
            crossed = getattr(getattr(self.build(), "transformer_blocks", [None])[0], "crossed_first", False)
            context.mask = _mask(self.shape[0], words if crossed else pixels, dtype)
            context.token_mask = _mask(self.shape[0], words, dtype)
        return (x, more), context

    def call(self, module: nn.Module, rewrites: Rewrites, dtype: torch.dtype = torch.float32) -> Tensor:
        terms, context = self.inputs(dtype)
        return run(module, terms, replace(context, rewrites=rewrites))


def run(module: nn.Module, terms: tuple[Tensor, Tensor], context: Context) -> Tensor:
    with torch.no_grad():
        return total(module(Sum(*terms) if context.rewrites.folded_residual else terms[0] + terms[1], context))


def _mask(samples: int, keys: int, dtype: torch.dtype) -> Tensor:
    return torch.where(normal(samples, 1, 1, keys, seed=4) > 0, 0.0, -10000.0).to(dtype)


def transformer(channels: int, heads: int, layers: int, width: int, groups: int, **options: bool) -> Any:
    options = {"linear": False, "crossed_first": False, **options}
    return lambda: Transformer(channels, heads=heads, layers=layers, context_channels=width, groups=groups, **options)


def spatial(channels: int, head_dim: int, groups: int | None, scale: float = 1.0) -> Any:
    return lambda: SpatialAttention(channels, head_dim=head_dim, groups=groups, scale=scale)


LAYOUTS = {
    "conv-head-8": Layout(transformer(24, 3, 1, 20, 4), (2, 24, 5, 3)),
    "linear-head-40-2-layers": Layout(transformer(80, 2, 2, 24, 5, linear=True), (1, 80, 3, 3), (77, 24)),
    "head-80-3-layers-crossed-first": Layout(
        transformer(80, 1, 3, 20, 8, crossed_first=True), (3, 80, 1, 5), (1, 20), masks=True
    ),
    "head-10-4-layers-masked": Layout(transformer(30, 3, 4, 20, 3, linear=True), (3, 30, 7, 1), masks=True),
    "text-as-wide": Layout(transformer(24, 3, 1, 24, 1), (2, 24, 2, 2), (5, 24)),
    "spatial": Layout(spatial(24, 8, 3), (2, 24, 5, 3)),
    "spatial-scaled-no-norm": Layout(spatial(24, 24, None, 2.0**0.5), (1, 24, 1, 1)),
    "spatial-head-288": Layout(spatial(288, 288, 32), (1, 288, 3, 2)),
}
CROSSED = {name: layout for name, layout in LAYOUTS.items() if "spatial" not in name}


class Adapter(nn.Module):
    """What stands in the place of a layer when a LoRA is loaded."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        down = base.weight.flatten(1).shape[1]
        shape = (1, 1) if base.weight.dim() == 4 else ()
        self.down = nn.Parameter(normal(2, down, *shape, seed=7) * 0.3, requires_grad=False)
        self.up = nn.Parameter(normal(base.weight.shape[0], 2, *shape, seed=8) * 0.3, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        apply = nn.functional.linear if self.down.dim() == 2 else nn.functional.conv2d
        return self.base(x) + apply(apply(x, self.down), self.up)


def counted(module: nn.Module, terms: Any, context: Context) -> Counter:
    with Counter() as counter:
        run(module, terms, context)
    return counter


def same(actual: Tensor, expected: Tensor) -> None:
    assert relative_error(actual, expected) <= 1e-5


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_output_is_preserved(layout, choice):
    rewrites = CHOICES[choice]
    module, plain = layout.build(), layout.call(layout.build(), Rewrites.none())
    truth = layout.call(layout.build(torch.float64), Rewrites.none(), torch.float64)
    for _ in range(2):
        actual = layout.call(module, rewrites)
        assert_close_to_truth(actual, truth, plain)
        if choice in BIT:
            assert torch.equal(actual, plain)
    wide = layout.call(layout.build(torch.float64), rewrites, torch.float64)
    torch.testing.assert_close(wide, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("layout", ["conv-head-8", "linear-head-40-2-layers", "spatial"])
def test_in_bfloat16(layout, choice):
    layout, dtype = LAYOUTS[layout], torch.bfloat16
    plain = layout.call(layout.build(dtype), Rewrites.none(), dtype)
    truth = layout.call(layout.build(dtype).double(), Rewrites.none(), torch.float64)
    rounded = [value.to(dtype).double() for value in layout.inputs()[0]]
    context = layout.inputs(dtype)[1]
    context = replace(context, tokens=context.tokens.double())
    truth = run(layout.build(dtype).double(), tuple(rounded), context)
    assert_close_to_truth(layout.call(layout.build(dtype), CHOICES[choice], dtype), truth, plain)


@pytest.mark.parametrize("choice", [*CHOICES, "none"])
@pytest.mark.parametrize("layout", ["conv-head-8", "linear-head-40-2-layers", "spatial"])
def test_an_adapter_in_a_layers_place_is_seen(layout, choice):
    layout, rewrites = LAYOUTS[layout], {**CHOICES, "none": Rewrites.none()}[choice]
    module, expected = layout.build(), layout.build()
    before = layout.call(module, rewrites)
    names = [name for name, leaf in module.named_modules() if type(leaf) in (nn.Linear, nn.Conv2d)]
    assert len(names) >= 4
    for name in names:
        for network in (module, expected):
            parent, _, child = name.rpartition(".")
            leaf = network.get_submodule(name)
            setattr(network.get_submodule(parent), child, Adapter(leaf))
        after = layout.call(module, rewrites)
        assert not torch.allclose(after, before, rtol=1e-4), name
        same(after, layout.call(expected, Rewrites.none()))
        before = after


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("layout", ["conv-head-8", "linear-head-40-2-layers", "spatial"])
def test_writing_to_a_parameter_is_seen(layout, choice):
    layout, rewrites = LAYOUTS[layout], CHOICES[choice]
    module = layout.build()
    terms, context = layout.inputs()
    context = replace(context, rewrites=rewrites)
    before = run(module, terms, context)
    for name, parameter in module.named_parameters():
        parameter.copy_(parameter.flip(0) * 1.5 + 0.1)
        after = run(module, terms, context)
        fresh = layout.build()
        fresh.load_state_dict(module.state_dict())
        same(after, run(fresh, terms, replace(context, rewrites=Rewrites.none())))
        if "to_k.bias" not in name:  # the softmax does not see what is added to every key
            assert not torch.equal(after, before), name
        before = after
    module.load_state_dict(layout.build().state_dict())
    same(run(module, terms, context), run(layout.build(), terms, replace(context, rewrites=Rewrites.none())))


@pytest.mark.parametrize("layout", CROSSED.values(), ids=CROSSED)
def test_the_texts_products_are_made_once(layout):
    module = layout.build()
    terms, context = layout.inputs()
    crossed = sum(1 + block.crossed_first for block in module.transformer_blocks)
    without = replace(context, rewrites=replace(Rewrites(), text_cache=False))
    every = counted(module, terms, without).products()
    assert counted(module, terms, without).products() == every
    context.rewrites = Rewrites()
    assert counted(module, terms, context).products() == every
    assert counted(module, terms, context).products() == every - crossed
    context.tokens.mul_(2)
    assert counted(module, terms, context).products() == every


def test_prompts_may_take_turns():
    layout = LAYOUTS["conv-head-8"]
    module = layout.build()
    terms, context = layout.inputs()
    context.rewrites = Rewrites()
    prompts = [replace(context, tokens=context.tokens + index) for index in range(4)]
    first = [run(module, terms, prompt) for prompt in prompts]
    counts = [counted(module, terms, prompt).products() for prompt in prompts]
    assert len(set(counts)) == 1
    assert counts[0] < counted(layout.build(), terms, context).products()
    assert all(torch.equal(run(module, terms, prompt), out) for prompt, out in zip(prompts, first, strict=True))


def test_text_that_has_gone_is_forgotten():
    layout = LAYOUTS["conv-head-8"]
    module = layout.build()
    for _ in range(3):
        layout.call(module, Rewrites())
    assert len(module.transformer_blocks[0].attn2.text.values()) == 1


@pytest.mark.parametrize("there", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
def test_moving_the_layers_is_seen(there):
    layout = LAYOUTS["linear-head-40-2-layers"]
    module = layout.build()
    terms, context = layout.inputs()
    context.rewrites = Rewrites()
    before = run(module, terms, context)
    module.to(there)
    wide = run(module, [value.to(there) for value in terms], replace(context, tokens=context.tokens.to(there)))
    assert wide.dtype == there
    module.float()
    after = run(module, terms, context)
    fresh = layout.build().to(there).float()
    same(after, run(fresh, terms, replace(context, rewrites=Rewrites.none())))
    assert torch.equal(after, before) == (there == torch.float64)


def test_autocast_is_seen():
    layout = LAYOUTS["conv-head-8"]
    module = layout.build()
    terms, context = layout.inputs()
    context.rewrites = Rewrites()
    before = run(module, terms, context)
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(run(module, terms, context), before)
    assert torch.equal(run(module, terms, context), before)
