"""How products of bfloat16 are made: which way for which processor, and a network on each of them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_unet import small_unet
from torch import Tensor, nn

import fastdiff
from fastdiff.models import packs, prepacked
from fastdiff.models.packs import Packed, Packs
from fastdiff.models.prepacked import convolve, convolve_both, convolve_doubled, products
from fastdiff.models.processor import Features, Products, products_of, this
from fastdiff.ops import native

EXTENSION: Any = native.extension()
OURS = ("winograd", "convolve", "multiply", "winograd_bfloat16", "convolve_bfloat16", "multiply_bfloat16")
WIDE = {"winograd", "convolve", "multiply"}

pytestmark = pytest.mark.skipif(isinstance(EXTENSION, str), reason="the extension is not built")


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        pytest.param(Features("DEFAULT", False, False), Products(), id="no vectors"),
        pytest.param(Features("AVX2", False, False), Products(widened=True), id="avx2"),
        pytest.param(Features("AVX512", False, False), Products(widened=True), id="avx512"),
        pytest.param(Features("AVX512", True, False), Products(most=2**27, filtered=True), id="avx512-bf16"),
        pytest.param(Features("AVX512", True, True), Products(most=2**22), id="amx"),
        pytest.param(Features("AVX512", False, True), Products(), id="amx alone"),
        pytest.param(Features("AVX2", False, True), Products(widened=True), id="amx, asked for avx2"),
    ],
)
def test_the_choice(features: Features, expected: Products) -> None:
    assert products_of(features) == expected


def test_features_are_those_of_the_machine() -> None:
    capability = EXTENSION.cpu_capability()
    assert this() == products_of(
        Features(capability, EXTENSION.has_bfloat16_products(), EXTENSION.has_bfloat16_tiles())
    )
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            flags = next((line.split() for line in file if line.startswith("flags")), None)
        if flags is not None:
            assert EXTENSION.has_bfloat16_tiles() == {"amx_bf16", "amx_tile"}.issubset(flags)
            assert EXTENSION.has_bfloat16_products() == (capability == "AVX512" and "avx512_bf16" in flags)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[Products], list[str]]:
    """Makes this machine's one with these products; gives the compiled functions that are called from then on."""

    def become(own: Products) -> list[str]:
        for module in (packs, prepacked):
            monkeypatch.setattr(module, "this", lambda: own)
        calls: list[str] = []
        for name in OURS:
            kernel = getattr(EXTENSION, name)
            monkeypatch.setattr(EXTENSION, name, lambda *args, n=name, k=kernel: calls.append(n) or k(*args))
        return calls

    return become


def maps(*shape: int) -> Tensor:
    return torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)


def layer(channels: int, outputs: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    torch.manual_seed(2)
    return nn.Conv2d(channels, outputs, size, stride, size // 2).bfloat16().requires_grad_(False)


def near(y: Tensor, exact: Tensor) -> bool:
    """Rounded once, or as a sum of two that are."""
    return y.shape == exact.shape and ((y.double() - exact).norm() < 1.5 * (exact.bfloat16() - exact).norm()).item()


def exactly(conv: nn.Conv2d, x: Tensor) -> Tensor:
    assert conv.bias is not None
    return F.conv2d(x.double(), conv.weight.double(), conv.bias.double(), conv.stride, conv.padding)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("conv", "size", "expected"),
    [
        (layer(128, 130), 16, "winograd"),
        (layer(31, 40), 16, "winograd"),
        (layer(3, 128), 16, "convolve"),
        (layer(128, 3), 16, "winograd"),
        (layer(31, 40, 1), 9, "convolve"),
        (layer(64, 64, 3, 2), 9, "convolve"),
    ],
    ids=["many", "odd", "from an image", "to an image", "1x1", "strided"],
)
def test_a_convolution_is_widened(conv: nn.Conv2d, size: int, expected: str, processor: Any) -> None:
    calls, x, held = processor(Products(widened=True)), maps(2, conv.in_channels, size, size), Packs()
    y = exactly(conv, x)
    assert near(convolve(conv, x, held), y)
    addend = maps(*y.shape)
    assert near(convolve(conv, x, held, addend=addend), y + addend.double())
    assert calls == [expected] * 2


def test_doubled_and_divided_maps_and_products_are_widened(processor: Any) -> None:
    calls, conv, held = processor(Products(widened=True)), layer(66, 64), Packs()
    for size in (2, 16):
        x = maps(1, 66, size, size)
        assert near(convolve_doubled(conv, x, held, bias=True), exactly(conv, F.interpolate(x, scale_factor=2.0)))
    halves = [half.contiguous(memory_format=torch.channels_last) for half in (x[:, :33], x[:, 33:])]
    together, whole = convolve_both(conv, *halves, held), exactly(conv, x)
    assert (together.double() - whole).norm() < 2 * (whole.bfloat16() - whole).norm()
    torch.manual_seed(3)
    linear, tokens = nn.Linear(33, 20).bfloat16().requires_grad_(False), torch.randn(2, 7, 33).bfloat16()
    assert linear.bias is not None
    exact = F.linear(tokens.double(), linear.weight.double(), linear.bias.double())
    assert near(products((linear,), tokens, held), exact)
    assert near(products((linear,), tokens, held, addend=tokens[..., :20]), exact + tokens[..., :20].double())
    assert set(calls) == WIDE


def test_one_copy_of_a_weight_stays_as_large_as_it_is(processor: Any) -> None:
    processor(Products(widened=True))
    conv, held = layer(64, 128), Packs()
    for size in (2, 4, 16):
        convolve(conv, maps(1, 64, size, size), held)
    assert [value.nbytes for value in held.values() if isinstance(value, Packed)] == [conv.weight.nbytes]


def test_tiles_leave_only_small_products_to_us(processor: Any) -> None:
    """And a weight that was needed for a large one stays in oneDNN's layout."""
    calls, conv, held = processor(products_of(Features("AVX512", True, True))), layer(64, 64), Packs()
    if not EXTENSION.has_bfloat16_products():
        pytest.skip("needs AVX-512 with bfloat16 products")
    small, large = maps(1, 64, 4, 4), maps(1, 64, 16, 16)
    for x in (small, large, small, large):
        assert near(convolve(conv, x, held), exactly(conv, x))
    assert calls == ["convolve_bfloat16"]
    assert near(convolve_doubled(conv, large, held, bias=True), exactly(conv, F.interpolate(large, scale_factor=2.0)))
    assert calls == ["convolve_bfloat16"]


def unet() -> tuple[nn.Module, tuple[Any, ...]]:
    model = small_unet()
    return model, (torch.randn(2, 4, 16, 16), torch.tensor(7), torch.randn(2, 5, 24))


def errors() -> tuple[float, float]:
    """Of bfloat16 to the same parameters in float64: eager, and accelerated."""
    model, args = unet()
    args = tuple(value.bfloat16() if value.is_floating_point() else value for value in args)
    model.bfloat16()
    with torch.no_grad():
        wide = tuple(value.double() if value.is_floating_point() else value for value in args)
        exact = copy.deepcopy(model).double()(*wide).sample
        eager = model(*args).sample.double()
        fastdiff.accelerate(model, strict=True)
        ours = [model(*args).sample.double() for _ in range(2)][1]
    return ((eager - exact).norm() / exact.norm()).item(), ((ours - exact).norm() / exact.norm()).item()


def test_a_network_is_widened(processor: Any) -> None:
    calls = processor(Products(widened=True))
    eager, ours = errors()
    assert ours < 1.2 * eager
    assert set(calls) == WIDE


def test_a_network_runs_where_there_is_only_avx2() -> None:
    """PyTorch and oneDNN too are held to AVX2, with which oneDNN has no products of bfloat16."""
    if EXTENSION.cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("the processor has no AVX2")
    script = (
        "import sys; sys.path[:0] = ['tests', 'tests/models']; import test_processor as t, torch\n"
        "assert t.EXTENSION.cpu_capability() == 'AVX2' and t.this().widened\n"
        "torch.ops.mkldnn._convolution_pointwise = torch.ops.mkldnn._linear_pointwise = None\n"
        "eager, ours = t.errors(); assert ours < 1.2 * eager, (eager, ours)"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
