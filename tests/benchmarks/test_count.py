"""Launches, FLOP and bytes on fake tensors: right on layers counted by hand, and the committed table is their text."""

from __future__ import annotations

import diffusers
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from benchmarks import rewrites
from benchmarks.count import Cost, count
from benchmarks.rewrites import Layout
from fastdiff import ops
from fastdiff.models import AutoencoderKL


def test_a_convolution_its_bias_and_an_activation():
    with FakeTensorMode():
        layer, x = nn.Conv2d(3, 8, 3, padding=1), torch.zeros(2, 3, 5, 7)
        found = count(lambda: F.silu(layer(x).transpose(2, 3)))
    out = 2 * 8 * 5 * 7
    assert found.operators == {
        "aten::convolution": Cost(1, 2 * out * 3 * 9, 4 * (x.numel() + 8 * 27 + 8 + out)),
        "bias of aten::convolution": Cost(1, 0, 4 * 2 * out),
        "aten::silu": Cost(1, 0, 4 * 2 * out),
    }


def test_operators_of_ours():
    with FakeTensorMode():
        q, k = torch.zeros(2, 4, 6, 10), torch.zeros(2, 4, 9, 10)
        x, weight, norm = torch.zeros(1, 8, 5, 3), torch.zeros(4 * 16, 8, 2, 2), torch.zeros(8)
        attention = count(lambda: ops.attention(q, k, k)).total
        library = count(lambda: F.scaled_dot_product_attention(q, k, k)).total
        doubled = count(lambda: ops.upsample_conv(x, weight, None)).total
        kernel, added = torch.zeros(6, 8, 3, 3), torch.zeros(1, 6, 3, 2)
        summed = count(lambda: ops.conv_bias_residual(x, kernel, None, added, 2, 1)).total
        whole = count(lambda: ops.group_norm_silu(x, 4, norm, norm)).total
    # Twice 2 * 4 heads, 6 queries, 9 keys, 10 channels; k is v.
    assert attention == Cost(1, 4 * 8 * 6 * 9 * 10, 4 * (2 * q.numel() + k.numel()))
    assert library.flops == attention.flops
    assert doubled == Cost(1, 2 * (16 * 10 * 6) * 8 * 4, 4 * (x.numel() + weight.numel() + 16 * 10 * 6))
    size = x.numel() + kernel.numel() + 2 * added.numel()
    assert summed == Cost(1, 2 * added.numel() * 8 * 9, 4 * size)
    assert whole.launches == 1


def test_layers_counted_by_hand():
    tokens, channels, inner = 2 * 7, 12, 20
    with FakeTensorMode():
        x, w, b = torch.zeros(2, 7, channels), torch.zeros(inner, channels), torch.zeros(inner)
        picture, weight = torch.zeros(2, 8, 5, 3), torch.zeros(8)
        half, scale, wide = torch.zeros(2, 4, 5, 3), torch.zeros(12), torch.zeros(2, 7, 2 * inner)
        linear = count(lambda: F.linear(x, w, b)).total
        products = count(lambda: (F.linear(x, w), F.linear(x, w))).total
        norm = count(lambda: F.group_norm(picture, 4, weight, weight)).total
        layers = count(lambda: F.layer_norm(x, (channels,))).total
        fused = count(lambda: ops.group_norm_silu(picture, 4, scale, scale, second=half)).total
        gated = count(lambda: ops.geglu(wide)).total
        added = count(lambda: ops.layer_norm_modulate(x, residual=x + 1, return_sum=True)).operators
        joined = count(lambda: torch.cat([picture, picture + 0], dim=1)).operators["aten::cat"]
        strided = count(lambda: F.conv2d(picture, torch.zeros(6, 8, 3, 3), stride=2, padding=1)).operators
    # A multiplication and an addition for each weight and token; the bias is added by the same call.
    assert linear == Cost(
        1, 2 * tokens * channels * inner, 4 * (tokens * channels + inner * channels + inner + tokens * inner)
    )
    assert products == Cost(2, 2 * linear.flops, 2 * (linear.bytes - 4 * inner))
    # Besides what a norm reads and writes: the mean and the deviation of every group or token.
    assert norm == Cost(1, 0, 4 * (2 * picture.numel() + 8 + 2 * 2 * 4))
    assert layers == Cost(1, 0, 4 * (2 * x.numel() + 2 * tokens))
    assert fused == Cost(1, 0, 4 * (2 * (picture.numel() + half.numel()) + 12))
    assert gated == Cost(1, 0, 4 * 3 * tokens * inner)
    assert added["fastdiff::layer_norm_modulate"] == Cost(1, 0, 4 * 4 * x.numel())
    assert joined == Cost(1, 0, 4 * 4 * picture.numel())
    out = 2 * 6 * 3 * 2
    assert strided["aten::convolution"] == Cost(1, 2 * out * 8 * 9, 4 * (picture.numel() + 6 * 8 * 9 + out))


def test_convolutions_in_tiles():
    """36 products for 4 x 4 results of Winograd's filtering instead of 9 for each."""
    with FakeTensorMode():
        x, small = torch.zeros(2, 128, 16, 16), torch.zeros(2, 128, 8, 8)
        weight, folded = torch.zeros(64, 128, 3, 3), torch.zeros(4 * 64, 128, 2, 2)
        calls = (
            lambda: F.conv2d(x, weight, padding=1),
            lambda: ops.conv_bias_residual(x, weight, None, None, 1, 1),
            lambda: ops.upsample_conv(small, folded, None),
        )
        others = (
            lambda: F.conv2d(x, weight, padding=1, stride=2),
            lambda: F.conv2d(x, torch.zeros(64, 2, 3, 3), groups=64),
            lambda: F.conv_transpose2d(small, torch.zeros(128, 64, 3, 3)),
            lambda: F.linear(x, torch.zeros(8, 16)),
        )
        for call in calls:
            direct, filtered = count(call).total, count(call, filtered=True).total
            assert filtered == Cost(direct.launches, 2 * (2 * 4 * 4) * 36 * 128 * 64, direct.bytes)
            assert filtered.flops < direct.flops
        for call in others:
            assert count(call).total == count(call, filtered=True).total


def test_the_row_of_winograd_alone_counts_in_tiles():
    layout = Layout(
        "wide",
        diffusers.AutoencoderKL,
        AutoencoderKL,
        {"block_out_channels": [128, 128], "norm_num_groups": 4, **_stages(2)},
        {"sample": (1, 4, 8, 8)},
        "decoder",
    )
    found = {step.name: step for step in rewrites.steps(layout)}
    whole, filtered = found["prepacked"].cost, found["winograd"].cost
    assert (filtered.launches, filtered.bytes) == (whole.launches, whole.bytes)
    assert filtered.flops < 0.6 * whole.flops
    assert found["winograd"].without == whole
    assert found["arena"].cost == filtered
    assert found["arena"].without == whole
    lines = rewrites.markdown(rewrites.rows([layout])).splitlines()
    own = next(line for line in lines if line.startswith("| `winograd` |"))
    saved = (whole.flops - filtered.flops) / 1e9
    assert own.endswith(f"| {filtered.flops / 1e9:.1f} | {filtered.bytes / 1e9:.2f} | 0 | {saved:.1f} | 0.00 |")
    assert lines[-1].endswith("`prepacked`, `arena`.")


def test_repeated_and_overwritten_memory_is_counted_as_it_lies():
    with FakeTensorMode():
        a, b, row = torch.zeros(4, 6), torch.zeros(4, 6), torch.zeros(1, 6)
        table, places = torch.zeros(100, 6), torch.zeros(3, dtype=torch.int64)
        assert count(lambda: a * row.expand(4, 6)).total.bytes == 4 * (24 + 6 + 24)
        assert count(lambda: a * a).total.bytes == 4 * (24 + 24)
        assert count(lambda: a.add_(b)).total.bytes == 4 * (24 + 24 + 24)
        assert count(lambda: a.copy_(b)).total.bytes == 4 * (24 + 24)
        assert count(lambda: F.embedding(places, table)).total.bytes == 4 * (18 + 18) + 8 * 3
        assert count(lambda: a.addmm_(b, torch.zeros(6, 6))).total.flops == 2 * 4 * 6 * 6
        assert count(lambda: a.view(24)[2:].detach()).total == Cost()


def test_the_steps_of_a_small_autoencoder():
    layout = Layout(
        "small",
        diffusers.AutoencoderKL,
        AutoencoderKL,
        {"block_out_channels": [8, 8], "norm_num_groups": 4, **_stages(2)},
        {"sample": (1, 4, 6, 6)},
        "decoder",
    )
    steps = rewrites.steps(layout)
    found = {step.name: step.cost for step in steps}
    for what in ("launches", "flops"):
        assert getattr(found["diffusers"], what) == getattr(found["none"], what), "it is what the library does"
    # Two residual blocks in the middle and two on each of two resolutions; the attention divides as well.
    assert found["none"].launches - found["unit_scale"].launches == 2 + 4 + 1
    # One activation less for each norm but that of the attention.
    assert found["channels_last"].launches - found["group_norm_silu"].launches == 2 * 6 + 1
    pixels = 12 * 12
    doubling = 2 * pixels * 8 * 8 * (9 - 4)
    assert found["add_layer_norm"].flops - found["upsample_conv"].flops == doubling
    without = {step.name: step.without for step in steps}
    whole = without["winograd"]
    assert without["diffusers"] is without["none"] is None
    assert without["upsample_conv"].flops - whole.flops == doubling
    # The first and the last map change their layout, but pictures of so few channels lie in both at once.
    assert without["text_cache"] == without["geglu"] == whole
    # What needs the others is turned off with them: the sums of seven blocks that a norm makes.
    assert without["unit_scale"].launches - whole.launches > found["none"].launches - found["unit_scale"].launches


def _stages(count: int) -> dict[str, list[str]]:
    return {"down_block_types": ["DownEncoderBlock2D"] * count, "up_block_types": ["UpDecoderBlock2D"] * count}


def test_the_committed_table_is_made_of_the_committed_csv():
    found = rewrites.read()
    assert {row["network"] for row in found} == {layout.title for layout in rewrites.LAYOUTS}
    assert rewrites.README.read_text(encoding="utf-8") == rewrites.readme(found)
