"""upsample_conv: a 3x3 convolution of a map upsampled to twice its size, from a folded weight."""

from __future__ import annotations

import itertools

import pytest
import torch
from convolutions import BACKENDS, Shape, doubled_convolution
from inputs import DTYPES, LAYOUTS, normal
from tolerance import assert_close_to_truth
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.errors import BackendError, InputError
from fastdiff.ops import reference

SHAPES = [
    Shape(1, 1, 1, 1, 1),
    Shape(2, 3, 5, 1, 1),
    Shape(1, 17, 33, 1, 6),
    Shape(3, 20, 7, 5, 1),
    Shape(2, 33, 40, 7, 5),
    Shape(1, 35, 70, 9, 15),
    Shape(3, 64, 48, 8, 8),
]


def check(backend: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Against the float64 truth from the 3x3 weight, so that the rounding of the folded one counts too."""
    folded, device = ops.fold_upsample(weight), BACKENDS[backend]
    with fastdiff.use_backend({"upsample_conv": backend}):
        out = ops.upsample_conv(x.to(device), folded.to(device), None if bias is None else bias.to(device))
    truth = doubled_convolution(x.double(), weight.double(), None if bias is None else bias.double())
    assert out.dtype == x.dtype
    assert out.is_contiguous(memory_format=reference.memory_format(x))
    assert_close_to_truth(out, truth, doubled_convolution(x, weight, bias))
    return out.cpu()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_folding_is_exact_in_float64(shape: Shape) -> None:
    x, weight, bias = shape.layer(torch.float64)
    out = ops.upsample_conv(x, ops.fold_upsample(weight), bias)
    torch.testing.assert_close(out, doubled_convolution(x, weight, bias), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_folded_weights_are_sums_of_taps_rounded_once(dtype: torch.dtype) -> None:
    weight = normal(5, 6, 3, 3, dtype=dtype)
    folded = ops.fold_upsample(weight)
    assert folded.dtype == dtype
    assert folded.is_contiguous(memory_format=torch.channels_last)
    taps = {0: ([0], [1, 2]), 1: ([0, 1], [2])}
    phases = folded.reshape(2, 2, 5, 6, 2, 2)
    for a, b, p, q in itertools.product(range(2), repeat=4):
        total = weight.double()[:, :, taps[a][p]][..., taps[b][q]].sum((2, 3))
        assert torch.equal(phases[a, b, :, :, p, q], total.to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_truth(backend: str, dtype: torch.dtype, shape: Shape, layout: torch.memory_format) -> None:
    x, weight, bias = shape.layer(dtype)
    check(backend, x.contiguous(memory_format=layout), weight, bias)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_truth_of_large_means_without_bias(backend: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x, weight, _ = Shape(2, 33, 40, 7, 5).layer(dtype, mean=100.0)
    check(backend, x.contiguous(memory_format=layout), weight, None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    x, weight, bias = (t.to(BACKENDS[backend]) for t in Shape(2, 24, 12, 12, 10).layer(torch.float32))
    view, folded, every_other = x[:, ::2, ::3, 1:], ops.fold_upsample(weight[:, :12]), bias.repeat_interleave(2)[::2]
    with fastdiff.use_backend({"upsample_conv": backend}):
        dense = ops.upsample_conv(view.contiguous(), folded, bias)
        strided = ops.upsample_conv(view, folded.contiguous(), every_other)
    assert strided.is_contiguous()
    torch.testing.assert_close(strided, dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pixel_reaches_its_neighbours_and_no_other_sample(backend: str) -> None:
    x, weight, bias = Shape(2, 5, 4, 4, 5).layer(torch.float32)
    x[0, 2, 1, 2] = torch.nan
    moved = (value.to(BACKENDS[backend]) for value in (x, ops.fold_upsample(weight), bias))
    with fastdiff.use_backend({"upsample_conv": backend}):
        out = ops.upsample_conv(*moved).cpu()
    reached = torch.zeros(8, 10, dtype=torch.bool)
    reached[1:5, 3:7] = True
    assert torch.equal(out[0].isnan(), reached.expand(4, -1, -1))
    assert out[1].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.usefixtures("many_threads")
def test_phases_on_many_threads(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x, weight, bias = Shape(2, 16, 48, 24, 20).layer(dtype)
    x = x.contiguous(memory_format=layout)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(check("native", x, weight, bias))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend: str) -> None:
    x, weight, bias = Shape(0, 3, 5, 4, 4).layer(torch.float32)
    moved = (value.to(BACKENDS[backend]) for value in (x, ops.fold_upsample(weight), bias))
    with fastdiff.use_backend({"upsample_conv": backend}):
        assert ops.upsample_conv(*moved).shape == (0, 5, 8, 8)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("biased", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
def test_opcheck(backend: str, biased: bool, layout: torch.memory_format) -> None:
    x, weight, bias = Shape(2, 4, 3, 3, 5).layer(torch.float32)
    values = (x.contiguous(memory_format=layout), ops.fold_upsample(weight), bias if biased else None)
    moved = tuple(None if value is None else value.to(BACKENDS[backend]) for value in values)
    with fastdiff.use_backend({"upsample_conv": backend}):
        torch.library.opcheck(torch.ops.fastdiff.upsample_conv.default, moved)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_compiles_without_graph_breaks(layout: torch.memory_format) -> None:
    x, weight, bias = Shape(2, 4, 3, 3, 5).layer(torch.float32)
    x = x.contiguous(memory_format=layout)

    def block(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.upsample_conv(x, ops.fold_upsample(weight), bias) * 2

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    out = compiled(x, weight, bias)
    assert torch.equal(out, block(x, weight, bias))
    assert out.stride() == block(x, weight, bias).stride()


def test_gradients_through_the_reference() -> None:
    x, weight, bias = (value.requires_grad_() for value in Shape(1, 2, 2, 2, 3).layer(torch.float64))
    with pytest.raises(InputError, match="upsample_conv: an input requires grad"):
        ops.upsample_conv(x, ops.fold_upsample(weight), bias)
    with fastdiff.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda x, weight, bias: ops.upsample_conv(x, ops.fold_upsample(weight), bias), (x, weight, bias)
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x has shape \(2, 3, 4\); expected \(N, C, H, W\)"),
        ({"x": torch.zeros(1, 3, 0, 4)}, r"x has shape \(1, 3, 0, 4\); expected \(N, C, H, W\) with C, H and W at"),
        ({"x": torch.zeros(1, 3, 4, 4, dtype=torch.int32)}, "x is torch.int32; expected float32"),
        (
            {"weight": torch.zeros(5, 3, 3, 3)},
            r"weight has shape \(5, 3, 3, 3\); expected \(4 \* Cout, 3, 2, 2\); pass",
        ),
        ({"weight": torch.zeros(6, 3, 2, 2)}, r"weight has shape \(6, 3, 2, 2\)"),
        ({"weight": torch.zeros(8, 4, 2, 2)}, r"weight has shape \(8, 4, 2, 2\)"),
        ({"weight": torch.zeros(())}, r"weight has shape \(\)"),
        ({"weight": torch.zeros(8, 3, 2, 2).half()}, r"weight is torch.float16; expected torch.float32 \(as x\)"),
        ({"bias": torch.zeros(8)}, r"bias has shape \(8,\); expected \(2,\)"),
        ({"bias": torch.zeros(2).double()}, r"bias is torch.float64; expected torch.float32 \(as x\)"),
        ({"bias": torch.zeros(2, device="meta")}, "bias is on meta, the first tensor on cpu"),
    ],
)
def test_errors(change: dict[str, Tensor], message: str) -> None:
    arguments = {"x": torch.zeros(1, 3, 4, 4), "weight": torch.zeros(8, 3, 2, 2), "bias": torch.zeros(2), **change}
    with pytest.raises(InputError, match="upsample_conv: " + message):
        ops.upsample_conv(**arguments)


@pytest.mark.parametrize("shape", [(3, 3), (4, 2, 5, 5), (4, 2, 3, 1)], ids=str)
def test_folding_refuses_other_weights(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"fold_upsample: weight has shape .* expected .Cout, Cin, 3, 3."):
        ops.fold_upsample(torch.zeros(shape))
    with pytest.raises(InputError, match=r"fold_upsample: weight is torch.int64"):
        ops.fold_upsample(torch.zeros(shape, dtype=torch.int64))


def test_choice_on_the_cpu() -> None:
    x, weight, bias = SHAPES[0].layer(torch.float32)
    assert fastdiff.explain("upsample_conv", x, ops.fold_upsample(weight), bias).startswith("upsample_conv: native\n")
    wide = (x.double(), ops.fold_upsample(weight.double()), None)
    assert fastdiff.explain("upsample_conv", *wide).startswith("upsample_conv: torch\n")
    with fastdiff.use_backend("native"), pytest.raises(BackendError, match="not float64"):
        ops.upsample_conv(*wide)
