"""The rewrites of the convolutional path: each leaves the output as it is, and does the less that it is there for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from typing import Any

import pytest
import torch
from tolerance import assert_close_to_truth
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.models import UNet
from fastdiff.models.rewrites import Rewrites
from fastdiff.models.times import MOST_ROWS, locate

NAMES = (
    *("unit_scale", "channels_last", "group_norm_silu", "upsample_conv", "time_cache"),
    *("split_skip", "folded_bias", "folded_residual"),
)
TIMES = torch.tensor([981, 640, 17])


@dataclass(frozen=True)
class Layout:
    """A network, and the inputs of a call besides the time."""

    config: dict[str, Any]
    shape: tuple[int, ...]
    extras: dict[str, Any] = field(default_factory=dict)
    residuals: bool = False

    def network(self) -> UNet:
        torch.manual_seed(5)
        network = UNet(**self.config).eval().requires_grad_(False).double()
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
        return network

    def arguments(self) -> dict[str, Any]:
        arguments = {"sample": _normal(*self.shape), **self.extras}
        if self.residuals:
            maps = _maps(self.network(), arguments)
            arguments["down_block_additional_residuals"] = [_normal(*shape) for shape in maps]
            arguments["mid_block_additional_residual"] = _normal(*maps[-1])
        return arguments


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _maps(network: UNet, arguments: dict[str, Any]) -> list[torch.Size]:
    """The sizes of the stored maps, as the stages on the way up get them."""
    seen: list[torch.Size] = []
    network.rewrites = Rewrites.none()
    for block in network.up_blocks:
        block.register_forward_pre_hook(lambda _, given: seen.extend(skip.shape for skip in reversed(given[1])))
    with torch.no_grad():
        network(timestep=3, **arguments)
    return seen[::-1]


_BASE = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 12],
    "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 4,
}
_CROSSED = {
    **_BASE,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 6,
    "attention_head_dim": 2,
}
_TOKENS = {"encoder_hidden_states": _normal(2, 5, 6)}
_SIZES = {"text_embeds": _normal(2, 10), "time_ids": torch.tensor([[64.0, 48.0, 0.0, 8.0, 64.0, 64.0]]).repeat(2, 1)}

LAYOUTS = {
    # On the way up 12 + 8 and 8 + 8 channels in 4 groups: the first has a group on both sides.
    "straddling": Layout(_BASE, (1, 3, 8, 12)),
    "odd": Layout({**_BASE, "downsample_padding": 0, "mid_block_scale_factor": 1.4142}, (3, 3, 9, 7)),
    "one-group": Layout({**_BASE, "norm_num_groups": 1, "layers_per_block": 2}, (2, 3, 6, 5)),
    "group-a-channel": Layout({**_BASE, "block_out_channels": [4, 4], "in_channels": 1}, (2, 1, 8, 8)),
    "scale-shift": Layout(
        {**_BASE, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 7, "norm_num_groups": 2},
        (2, 3, 8, 6),
        {"class_labels": torch.tensor([2, 6])},
    ),
    "resampling-blocks": Layout(
        {
            **_BASE,
            "down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"],
            "up_block_types": ["AttnUpBlock2D", "ResnetUpsampleBlock2D"],
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "block_out_channels": [8, 12],
        },
        (2, 3, 12, 8),
    ),
    "resampling-scale-shift": Layout(
        {
            **_CROSSED,
            "down_block_types": ["ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
            "resnet_time_scale_shift": "scale_shift",
            "resnet_out_scale_factor": 1.3,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": 5,
            "class_embeddings_concat": True,
            "time_cond_proj_dim": 3,
            "time_embedding_type": "fourier",
        },
        (2, 3, 8, 8),
        {**_TOKENS, "class_labels": _normal(2, 5), "timestep_cond": _normal(2, 3)},
    ),
    "added-and-controlled": Layout(
        {
            **_CROSSED,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 2,
            "projection_class_embeddings_input_dim": 22,
        },
        (2, 3, 7, 10),
        {**_TOKENS, "added_cond_kwargs": _SIZES},
        residuals=True,
    ),
    "three-stages": Layout(
        {
            **_BASE,
            "block_out_channels": [6, 12, 18],
            "norm_num_groups": 3,
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
            "attention_head_dim": 6,
        },
        (1, 3, 13, 16),
    ),
}


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


@contextmanager
def counted(layer: nn.Module) -> Iterator[list[int]]:
    """The rows of each product that a layer's weight enters, without making the layer anything but plain."""
    rows: list[int] = []
    product = nn.functional.linear

    def record(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is layer.weight:
            rows.append(len(x))
        return product(x, weight, bias)

    nn.functional.linear = record
    try:
        yield rows
    finally:
        nn.functional.linear = product


def fresh(name: str) -> tuple[UNet, dict[str, Any], nn.Module]:
    network, arguments = LAYOUTS[name].network(), LAYOUTS[name].arguments()
    return network, arguments, network.mid_block.resnets[0].time_emb_proj


@torch.no_grad()
@pytest.mark.parametrize("layout", ["straddling", "scale-shift", "resampling-scale-shift", "added-and-controlled"])
@pytest.mark.parametrize("expanded", [False, True], ids=["element", "expanded"])
def test_a_run_projects_its_times_once(layout, expanded):
    network, arguments, layer = fresh(layout)
    samples, times = len(arguments["sample"]), torch.linspace(990, 0, 6).round().long()
    with counted(layer) as rows:
        for t in times:
            network(timestep=t.expand(samples) if expanded else t, **arguments)
    assert rows == [samples, samples * len(times)]


@torch.no_grad()
@pytest.mark.parametrize(
    "timestep",
    [lambda: 17, lambda: torch.tensor(17), lambda: torch.tensor([17, 17]), lambda: TIMES.view(3, 1)[2].repeat(2)],
    ids=["number", "alone", "vector", "copied"],
)
def test_a_time_that_is_in_no_vector_is_projected_at_each_call(timestep):
    network, arguments, layer = fresh("scale-shift")
    with counted(layer) as rows:
        for _ in range(3):
            network(timestep=timestep(), **arguments)
    assert rows == [2, 2, 2]


@torch.no_grad()
def test_a_table_is_made_anew_for_what_it_was_made_of():
    network, arguments, layer = fresh("scale-shift")

    def check(t: Tensor, **more: Any) -> None:
        actual = network(timestep=t, **{**arguments, **more})
        expected = network(timestep=int(t), **{**arguments, **more})
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)

    times = torch.tensor([900, 500, 100])
    for t in times:
        check(t)
    before = network(timestep=times[1], **arguments)
    for change in (
        lambda: layer.weight.mul_(2.0),
        lambda: network.time_embedding.linear_1.bias.add_(1.0),
        lambda: network.class_embedding.weight.add_(0.5),
        lambda: arguments["class_labels"].fill_(4),
        lambda: times.add_(7),
        lambda: network.mid_block.resnets[0].conv1.bias.add_(1.0),
    ):
        change()
        for t in times:
            check(t)
        after = network(timestep=times[1], **arguments)
        assert not torch.equal(before, after)
        before = after
    for t in times:
        check(t, class_labels=torch.tensor([1, 3]))


@torch.no_grad()
def test_a_layer_of_other_code_is_called_for_each_time():
    network, arguments, layer = fresh("scale-shift")

    class Adapter(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer, self.scale = base_layer, 1.0

        def forward(self, x: Tensor) -> Tensor:
            return self.base_layer(x) + self.scale * x.mean()

    network.mid_block.resnets[0].time_emb_proj = adapter = Adapter(layer)
    network.mid_block.resnets[0].conv1 = Adapter(network.mid_block.resnets[0].conv1)
    for t in TIMES:
        expected = network(timestep=int(t), **arguments)
        torch.testing.assert_close(network(timestep=t, **arguments), expected, rtol=1e-9, atol=1e-10)
    adapter.scale = 3.0
    assert not torch.equal(network(timestep=TIMES[2], **arguments), expected)


def test_in_inference_mode_nothing_is_remembered_of_its_tensors():
    network, arguments, layer = fresh("straddling")
    with torch.inference_mode(), counted(layer) as rows:
        times = TIMES + 0
        for t in times:
            network(timestep=t, **arguments)
    assert rows == [1, 1, 1]


def test_a_place_in_a_vector_is_found_without_a_look():
    times = torch.arange(12)
    assert locate(times[5])[0] is times
    assert locate(times[5])[1] == 5
    assert locate(times[5:6])[1] == 5
    assert locate(times[2:][3].expand(4))[1] == 5
    assert locate(times[::2][3])[1] == 6
    assert locate(times[2:5]) is None
    assert locate(times.view(3, 4)[1, 2])[1] == 6
    assert locate(torch.arange(12).view(3, 4).clone()[1, 2]) is None
    assert locate(torch.tensor(5)) is None
    assert locate(5) is None
    assert locate(torch.empty(12, device="meta")[7])[1] == 7


@torch.no_grad()
def test_a_table_has_a_largest_size():
    network, arguments, layer = fresh("straddling")
    times = torch.arange(MOST_ROWS + 1)
    with counted(layer) as rows:
        for t in times[:3]:
            network(timestep=t, **arguments)
    assert rows == [1, 1, 1]


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
