"""What a profile counts and measures of each operator."""

from __future__ import annotations

import os

import pytest
import torch
from known_machine import Known
from torch import nn
from torch.nn import functional as F

from fastdiff import config, ops, profiling
from fastdiff.errors import InputError
from fastdiff.models import prepacked
from fastdiff.models.packs import Packs
from fastdiff.models.rewrites import Rewrites
from fastdiff.profiling import Machine, machine, measure, table
from fastdiff.profiling.recording import EVENTS, packed_products_recorded


def rows(call: object, dtype: torch.dtype = torch.float32) -> dict[str, measure.Row]:
    return {row.name: row for row in profiling.profile(call, dtype=dtype, steps=2, machine=Known()).rows}


def counted(row: measure.Row) -> tuple[int, int, int]:
    return row.calls, row.flops, row.bytes


def test_pytorch_s_operators_are_counted():
    x, weight, bias = torch.randn(2, 6, 8, 8), torch.randn(4, 3, 3, 3), torch.randn(4)
    tokens, matrix = torch.randn(2, 5, 8), torch.randn(7, 8)
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 9, 4)
    norm = torch.ones(6)

    def call() -> None:
        F.conv2d(x, weight, bias, stride=2, padding=1, groups=2)
        F.conv2d(x, torch.randn(4, 6, 3, 3), padding=1, dilation=2)
        F.linear(tokens, matrix)
        F.linear(tokens, matrix)
        F.linear(tokens, torch.randn(3, 8), torch.randn(3))
        F.conv2d(x, torch.randn(5, 6, 3, 5), padding="same")
        F.conv2d(x, torch.randn(5, 6, 3, 5), padding="valid")
        F.scaled_dot_product_attention(q, k, k)
        F.group_norm(x, 2, norm, norm)
        x + x[:, :1]
        F.interpolate(x, scale_factor=2.0)
        x.permute(1, 0, 2, 3).reshape(-1)
        x.view(-1)

    found = rows(call)
    out = 2 * 4 * 4 * 4
    assert counted(found["conv2d 3x3 stride 2 6 -> 4, 2x4x4"]) == (
        1,
        2 * out * 3 * 9,
        4 * (x.numel() + weight.numel() + 4 + out),
    )
    assert found["conv2d 3x3 6 -> 4, 2x6x6"].flops == 2 * (2 * 4 * 6 * 6) * 6 * 9
    assert counted(found["linear 8 -> 7, 10 rows"]) == (2, 2 * 2 * 10 * 8 * 7, 2 * 4 * (80 + 56 + 70))
    assert counted(found["linear 8 -> 3, 10 rows"]) == (1, 2 * 10 * 8 * 3, 4 * (80 + 24 + 3 + 30))
    assert found["conv2d 3x5 6 -> 5, 2x8x8"].flops == 2 * (2 * 5 * 8 * 8) * 6 * 15
    assert found["conv2d 3x5 6 -> 5, 2x6x4"].flops == 2 * (2 * 5 * 6 * 4) * 6 * 15
    assert counted(found["attention 2x3x5x4, 9 keys"]) == (1, 4 * 6 * 5 * 9 * 4, 4 * (2 * 120 + 2 * 216))
    assert counted(found["group_norm 2x6x8x8"]) == (1, 0, 4 * (2 * x.numel() + 12))
    assert counted(found["add 2x6x8x8"]) == (1, 0, 4 * (2 * x.numel() + x.numel() // 6))
    assert counted(found["upsample_nearest2d 2x6x8x8"]) == (1, 0, 4 * 5 * x.numel())
    assert counted(found["reshape 6x2x8x8"]) == (1, 0, 4 * 2 * x.numel())
    assert counted(found["view"]) == (1, 0, 0)


def test_products_of_bfloat16_are_half_as_many_bytes():
    x, weight = torch.randn(3, 8).bfloat16(), torch.randn(5, 8).bfloat16()
    found = rows(lambda: F.linear(x, weight), torch.bfloat16)
    assert found["linear 8 -> 5, 3 rows"].bytes == 2 * (24 + 40 + 15)


def test_operators_of_ours_are_counted():
    x, q = torch.randn(1, 8, 6, 4), torch.randn(1, 2, 5, 8)
    norm, wide = torch.ones(8), torch.randn(2, 3, 10)
    folded = ops.fold_upsample(torch.randn(5, 8, 3, 3))

    def call() -> None:
        ops.group_norm_silu(x, 2, norm, norm)
        ops.attention(q, q, q)
        ops.geglu(wide)
        ops.upsample_conv(x, folded, None)

    found = rows(call)
    assert counted(found["group_norm_silu 1x8x6x4"]) == (1, 0, 4 * (2 * x.numel() + 16))
    assert found["attention 1x2x5x8, 5 keys"].flops == 4 * 2 * 5 * 5 * 8
    assert found["geglu 2x3x10"].bytes == 4 * (60 + 30)
    assert found["conv2d 3x3 8 -> 5, 1x12x8"].flops == 2 * (12 * 8 * 5) * 8 * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_products_are_the_layers_that_they_stand_for(dtype: torch.dtype):
    """With their weights laid out nothing of PyTorch's own shows them."""
    conv, half, leaf = nn.Conv2d(12, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(12, 8)
    for module in (conv, half, leaf):
        module.to(dtype=dtype, memory_format=torch.channels_last).requires_grad_(False)
    x = torch.randn(2, 12, 8, 6, dtype=dtype).contiguous(memory_format=torch.channels_last)
    small, tokens, packs = (
        x[:, :8].contiguous(memory_format=torch.channels_last),
        torch.randn(2, 3, 12).to(dtype),
        Packs(),
    )
    ready = packs.ready(x, Rewrites(), conv)
    assert ready is not None
    addend = torch.randn(2, 8, 4, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def call() -> None:
        prepacked.convolve(conv, x, ready, addend=addend)
        prepacked.convolve_both(conv, small, x[:, 8:].contiguous(memory_format=torch.channels_last), ready)
        prepacked.products((leaf, leaf), tokens, ready)
        prepacked.convolve(half, small, None)
        if prepacked.doubles(half, small, ready):
            prepacked.convolve_doubled(half, small, ready, bias=True)

    found = rows(call, dtype)
    size = torch.finfo(dtype).bits // 8
    out, weight = 2 * 8 * 4 * 3, 8 * 12 * 9
    both = found["conv2d 3x3 stride 2 12 -> 8, 2x4x3"]
    assert counted(both) == (2, 2 * 2 * out // 8 * weight, size * (2 * (x.numel() + weight + 8 + out) + out))
    assert counted(found["linear 12 -> 16, 6 rows"]) == (1, 2 * 6 * 12 * 16, size * (72 + 192 + 96))
    assert found["conv2d 3x3 8 -> 8, 2x8x6"].calls == 1
    assert found["conv2d 3x3 8 -> 8, 2x16x12"].flops == 2 * (2 * 8 * 16 * 12) * 8 * 9


def test_functions_are_recorded_where_networks_call_them_and_nowhere_else():
    from fastdiff.models import blocks, packing

    own = {name: getattr(prepacked, name) for name in EVENTS}
    places = [(prepacked, "convolve"), (blocks, "convolve"), (blocks, "convolve_both"), (packing, "products")]
    with packed_products_recorded():
        for module, name in places:
            assert getattr(module, name) is not own[name]
            assert getattr(module, name).__wrapped__ is own[name]
    for module, name in places:
        assert getattr(module, name) is own[name]
    with pytest.raises(InputError), packed_products_recorded():
        raise InputError("")
    for module, name in places:
        assert getattr(module, name) is own[name]


def test_a_row_is_held_to_the_roofline():
    x = torch.randn(4, 8, 16, 16)
    conv = rows(lambda: F.conv2d(x, torch.ones(8, 8, 3, 3)))["conv2d 3x3 8 -> 8, 4x14x14"]
    added = rows(lambda: x + 1.0)["add 4x8x16x16"]
    assert conv.best == pytest.approx(conv.flops * 1e-9)
    assert table.bound(conv) == "compute"
    assert added.best == pytest.approx(added.bytes * 1e-9)
    assert table.bound(added) == "memory"


def test_the_rows_of_a_step_add_up_to_it():
    x = torch.randn(64, 64, 32, 32)

    def call() -> None:
        F.silu(x)
        sum(range(300_000))

    found = profiling.profile(call, dtype=torch.float32, steps=3, machine=Known())
    between = next(row for row in found.rows if row.operator == "between operators")
    assert [row.operator for row in found.operators()] == [row.operator for row in found.rows]
    assert between.seconds > 0.001
    assert table.bound(between) == ""
    assert 0.3 * found.seconds < found.profiled < 3.0 * found.seconds
    assert sum(row.seconds for row in found.operators()) == pytest.approx(found.profiled)


def test_the_machine_is_measured():
    here = Machine()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert 1e7 < here.flops(dtype) < 1e15
    assert 1e8 < here.copying(2**20) < 1e14
    assert here.copying(2**20) == here.copying(2**20 - 1)
    computing, moving = here.seconds(10**9, 1, torch.float32), here.seconds(1, 2**28, torch.float32)
    assert computing == 1e9 / here.flops(torch.float32)
    assert moving == 2**28 / here.copying(2**28)
    assert here.seconds(0, 0, torch.float32) == 0.0


def test_the_profiler_says_nothing_unless_it_is_asked(monkeypatch: pytest.MonkeyPatch):
    # Set first, so that whatever happens here is undone.
    monkeypatch.setenv("KINETO_LOG_LEVEL", "1")
    config.quieten_profiler()
    assert os.environ["KINETO_LOG_LEVEL"] == "1"
    del os.environ["KINETO_LOG_LEVEL"]
    rows(lambda: torch.ones(2) + 1)
    assert int(os.environ["KINETO_LOG_LEVEL"]) > 50


def test_large_products_are_left_out_where_they_take_long(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []

    def product(dtype: torch.dtype, n: int, threads: int) -> float:
        asked.append(n)
        return {torch.float32: 1e12, torch.float16: 1e9}[dtype] + n

    monkeypatch.setattr(machine, "_product", product)
    assert Machine().flops(torch.float32) == 1e12 + 2048
    assert Machine().flops(torch.float16) == 1e9 + 512
    assert asked == [512, 1024, 2048, 512]
