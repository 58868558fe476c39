"""The rewrites of the convolutional path: each leaves the output as it is, and does the less that it is there for."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_truth
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from unet_layouts import LAYOUTS, TIMES

from fastdiff.models import UNet
from fastdiff.models.rewrites import Rewrites

NAMES = (
    *("unit_scale", "channels_last", "group_norm_silu", "upsample_conv", "time_cache"),
    *("split_skip", "folded_bias", "folded_residual"),
)


@cache
def built(name: str) -> tuple[UNet, dict[str, Any]]:
    return LAYOUTS[name].network(), LAYOUTS[name].arguments()


def outputs(name: str, rewrites: Rewrites) -> list[Tensor]:
    """The network's outputs for three steps of a run: the first is without a table of times, the others read one."""
    network, arguments = built(name)
    network.rewrites = rewrites
    with torch.no_grad():
        return [network(timestep=t, **arguments) for t in TIMES]


@cache
def eager(name: str) -> list[Tensor]:
    return outputs(name, Rewrites.none())


def assert_preserved(name: str, rewrites: Rewrites) -> None:
    for actual, expected in zip(outputs(name, rewrites), eager(name), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rewrite", NAMES)
def test_a_rewrite_preserves_the_output(rewrite, layout):
    assert_preserved(layout, Rewrites.parse(rewrite))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_rewrites_preserve_the_output(layout):
    assert_preserved(layout, Rewrites())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_two_rewrites_go_together_and_can_be_left_out_together(layout):
    for pair in combinations(NAMES, 2):
        assert_preserved(layout, Rewrites.parse(pair))
        assert_preserved(layout, Rewrites.parse(set(NAMES) - set(pair)))


class Launches(TorchDispatchMode):
    """Counts the operators that run; those of convolutions with a bias as `biased`."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        if function.overloadpacket.__name__ == "convolution" and args[2] is not None:
            self.counts["biased"] += 1
        return function(*args, **(kwargs or {}))


def launches(name: str, rewrites: Rewrites) -> Counter[str]:
    """What the third step of a run launches; the operators of fastdiff count as one each."""
    network, arguments = built(name)
    network.rewrites = rewrites
    with torch.no_grad():
        for t in TIMES[:2]:
            network(timestep=t, **arguments)
        with Launches() as mode:
            network(timestep=TIMES[2], **arguments)
    return mode.counts


@pytest.mark.parametrize(
    ("rewrite", "operator", "left"),
    [
        ("unit_scale", "div", 1),  # in the frequencies of the sines
        ("group_norm_silu", "native_group_norm", 0),
        ("upsample_conv", "upsample_nearest2d", 0),
        ("split_skip", "cat", 1),  # of sines and cosines
    ],
)
def test_what_a_rewrite_saves_is_gone(rewrite, operator, left):
    off, on = {"group_norm_silu"} - {rewrite}, {"group_norm_silu", rewrite}
    assert launches("straddling", Rewrites.parse(off))[operator] > left
    assert launches("straddling", Rewrites.parse(on))[operator] == left


def test_a_sum_is_made_by_the_norm_that_reads_it():
    names = {"group_norm_silu", "unit_scale"}
    folded, plain = (launches("one-group", Rewrites.parse(names | more)) for more in ({"folded_residual"}, set()))
    # All on the way down but the one before the downsampler, those in the middle but the last, and the very last.
    assert plain["add"] - folded["add"] == 3 + 2 + 1


def test_the_convolutions_before_a_norm_have_no_bias():
    network, _ = built("one-group")
    blocks = len([path for path, _ in network.named_modules() if path.endswith("conv1")])
    folded = launches("one-group", Rewrites.parse({"group_norm_silu", "folded_bias"}))
    assert folded["convolution"] - folded["biased"] == blocks


@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels-last"])
@pytest.mark.parametrize("layout", ["straddling", "odd", "resampling-blocks", "added-and-controlled"])
def test_maps_lie_channels_last_and_the_output_as_the_input(layout, given):
    network, arguments = built(layout)
    network.rewrites = Rewrites()
    lying = []
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    hooks = [
        module.register_forward_hook(
            lambda _, args, out: lying.extend(
                value.is_contiguous(memory_format=torch.channels_last) for value in (args[0], out)
            )
        )
        for module in convolutions
    ]
    sample = arguments["sample"].contiguous(memory_format=given)
    with torch.no_grad():
        out = network(**{**arguments, "sample": sample}, timestep=3)
    for hook in hooks:
        hook.remove()
    assert lying
    assert all(lying)
    assert out.is_contiguous(memory_format=given)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["straddling", "resampling-blocks"])
def test_a_folded_weight_follows_its_convolution(layout):
    network, arguments = LAYOUTS[layout].network(), LAYOUTS[layout].arguments()
    upsampler = network.up_blocks[0].upsamplers[0]
    weight = (upsampler.conv1 if layout == "resampling-blocks" else upsampler.conv).weight
    before = network(timestep=3, **arguments)
    weight.mul_(-1.0)
    after = network(timestep=3, **arguments)
    network.rewrites = Rewrites.none()
    torch.testing.assert_close(after, network(timestep=3, **arguments), rtol=1e-9, atol=1e-10)
    assert not torch.equal(before, after)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["odd", "scale-shift", "resampling-blocks", "added-and-controlled"])
def test_autocast_chooses_the_dtypes_as_without_rewrites(layout):
    network, arguments = LAYOUTS[layout].network(), LAYOUTS[layout].arguments()
    truth = eager(layout)[1]
    arguments = _single(arguments)
    network.float()
    with torch.autocast("cpu", torch.bfloat16):
        actual = [network(timestep=t, **arguments) for t in TIMES[:2]][1]
        network.rewrites = Rewrites.none()
        plain = network(timestep=TIMES[1], **arguments)
    assert actual.dtype == plain.dtype == torch.bfloat16
    assert_close_to_truth(actual, truth, plain)


def _single(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _single(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_single(inner) for inner in value]
    return value.float() if value.is_floating_point() else value
