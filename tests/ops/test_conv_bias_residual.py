"""conv_bias_residual: a convolution with a bias and a map of its result's shape added, in any stride and padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convolutions import BACKENDS, channels_last, layer
from inputs import DTYPES, LAYOUTS, normal
from tolerance import assert_close_to_truth
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.errors import BackendError, InputError
from fastdiff.ops import reference, triton
from fastdiff.ops.torch_library import onednn_dtypes


@dataclass(frozen=True)
class Conv:
    batch: int
    channels: int
    outputs: int
    size: tuple[int, int]
    taps: tuple[int, int] = (3, 3)
    stride: Any = 1
    padding: Any = 1

    def __str__(self) -> str:
        taps, size = ("x".join(map(str, pair)) for pair in (self.taps, self.size))
        return f"{self.batch}x{self.channels}to{self.outputs}x{size}-{taps}-by-{self.stride}-in-{self.padding}"


CONVS = [
    Conv(1, 1, 1, (1, 1)),
    Conv(2, 3, 5, (1, 1), (1, 1), padding=0),
    Conv(3, 20, 7, (5, 1)),
    Conv(2, 130, 65, (7, 5), (1, 1), padding=0),
    Conv(2, 33, 70, (9, 15)),
    Conv(2, 17, 33, (9, 6), stride=2),
    Conv(1, 16, 64, (8, 10), stride=2, padding=0),
    Conv(2, 5, 6, (6, 7), (2, 5), (3, 2), (0, 4)),
    Conv(1, 4, 9, (4, 11), (1, 7), (1, 3), [2, 3]),
    Conv(1, 3, 4, (2, 2), (4, 4), padding=3),
]
TYPICAL = CONVS[4]


def inputs(conv: Conv, dtype: torch.dtype, mean: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and residual."""
    x, weight, bias = layer(conv.batch, conv.channels, conv.outputs, conv.size, conv.taps, dtype=dtype, mean=mean)
    shape = F.conv2d(x.to("meta"), weight.to("meta"), None, conv.stride, conv.padding).shape
    return x, weight, bias, normal(*shape, seed=3, dtype=dtype)


def composite(conv: Conv, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """The formula as networks write it."""
    y = F.conv2d(x, weight, bias, conv.stride, conv.padding)
    return y if residual is None else residual + y


def run(backend: str, conv: Conv, *tensors: Tensor | None) -> Tensor:
    moved = (None if value is None else value.to(BACKENDS[backend]) for value in tensors)
    with fastdiff.use_backend({"conv_bias_residual": backend}):
        return ops.conv_bias_residual(*moved, conv.stride, conv.padding).cpu()  # type: ignore[misc]


def check(backend: str, conv: Conv, x: Tensor, *others: Tensor | None) -> Tensor:
    out = run(backend, conv, x, *others)
    truth = composite(conv, *(None if value is None else value.double() for value in (x, *others)))  # type: ignore[arg-type]
    assert out.dtype == x.dtype
    assert out.is_contiguous(memory_format=reference.memory_format(x))
    assert_close_to_truth(out, truth, composite(conv, x, *others))  # type: ignore[call-arg]
    return out


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("conv", CONVS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_truth(backend: str, dtype: torch.dtype, conv: Conv, layout: torch.memory_format) -> None:
    x, *others = inputs(conv, dtype)
    check(backend, conv, x.contiguous(memory_format=layout), *others)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("given", ["bias", "residual", "neither"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_truth_with_less_to_add(backend: str, dtype: torch.dtype, given: str, layout: torch.memory_format) -> None:
    x, weight, bias, residual = inputs(TYPICAL, dtype, mean=100.0)
    less = (bias if given == "bias" else None, residual if given == "residual" else None)
    check(backend, TYPICAL, x.contiguous(memory_format=layout), weight, *less)


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_it_is_exact_in_float64(conv: Conv) -> None:
    x, weight, bias, residual = inputs(conv, torch.float64)
    out = ops.conv_bias_residual(x, weight, bias, residual, conv.stride, conv.padding)
    torch.testing.assert_close(out, composite(conv, x, weight, bias, residual), rtol=1e-12, atol=1e-12)


def test_stride_and_padding_are_those_of_a_convolution_unless_given() -> None:
    x, weight, bias, _ = inputs(TYPICAL, torch.float32)
    torch.testing.assert_close(ops.conv_bias_residual(x, weight), F.conv2d(x, weight))
    torch.testing.assert_close(
        ops.conv_bias_residual(x, weight, bias=bias, padding=(0, 2)), F.conv2d(x, weight, bias, padding=(0, 2))
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_half_precision_result_is_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """256 + 1 + 256 * -1 = 1: rounded before the residual is added, 257 would be 256."""
    if backend == "torch" and dtype not in onednn_dtypes():
        pytest.skip("PyTorch's own kernels round the sum before the residual is added")
    big = 2.0 ** (8 if dtype == torch.bfloat16 else 11)
    x = torch.tensor([big, 1.0], dtype=dtype).expand(2, 3, 3, 2).contiguous().permute(0, 3, 1, 2)
    weight, residual = torch.ones(4, 2, 1, 1, dtype=dtype), torch.full((2, 4, 3, 3), -big, dtype=dtype)
    out = run(backend, Conv(2, 2, 4, (3, 3), (1, 1), padding=0), x, weight, None, residual)
    assert torch.equal(out, torch.ones_like(residual))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    x, weight, bias, residual = inputs(Conv(2, 24, 12, (12, 10)), torch.float32)
    view, part, every_other = x[:, ::2, ::3, 1:], weight[:, 12:], bias.repeat_interleave(2)[::2]
    added = residual[:, :, ::3, 1:]
    dense = run(backend, TYPICAL, *(value.contiguous() for value in (view, part, every_other, added)))
    strided = run(backend, TYPICAL, view, part, every_other, added)
    assert strided.is_contiguous()
    torch.testing.assert_close(strided, dense)
    mixed = run(backend, TYPICAL, view.contiguous(memory_format=torch.channels_last), part, bias, added.contiguous())
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(mixed, dense)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_added_is_neither_kept_nor_written(backend: str) -> None:
    x, weight, bias, residual = (value.to(BACKENDS[backend]) for value in inputs(TYPICAL, torch.float32))
    before = residual.clone()
    with fastdiff.use_backend({"conv_bias_residual": backend}):
        out = ops.conv_bias_residual(x, weight, bias, residual, 1, 1)
    assert torch.equal(residual, before)
    assert out.data_ptr() != residual.data_ptr()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pixel_reaches_its_neighbours_and_no_other_sample(backend: str) -> None:
    conv = Conv(2, 5, 4, (4, 5))
    x, weight, bias, residual = inputs(conv, torch.float32)
    x[0, 2, 1, 2] = torch.nan
    residual[1, 3, 0, 4] = torch.inf
    out = run(backend, conv, x, weight, bias, residual)
    reached = torch.zeros(4, 5, dtype=torch.bool)
    reached[0:3, 1:4] = True
    assert torch.equal(out[0].isnan(), reached.expand(4, -1, -1))
    assert torch.equal((~out[1].isfinite()).nonzero(), torch.tensor([[3, 0, 4]]))


@pytest.mark.parametrize("conv", [Conv(2, 16, 200, (24, 20)), Conv(1, 64, 300, (4, 4))], ids=["pixels", "outputs"])
@pytest.mark.usefixtures("many_threads")
def test_on_many_threads(conv: Conv) -> None:
    """The threads share the pixels, or the outputs where the pixels are few."""
    x, *others = inputs(conv, torch.float32)
    x, results = channels_last(x), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(check("native", conv, x, *others))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("residual", [torch.zeros(0, 5, 4, 4), None], ids=["residual", "no residual"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_batch(backend: str, residual: Tensor | None) -> None:
    x, weight, bias, _ = inputs(Conv(1, 3, 5, (4, 4)), torch.float32)
    assert run(backend, TYPICAL, x[:0], weight, bias, residual).shape == (0, 5, 4, 4)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("added", [True, False], ids=["bias and residual", "nothing added"])
@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
def test_opcheck(backend: str, added: bool, layout: torch.memory_format) -> None:
    x, *others = inputs(Conv(2, 4, 3, (3, 5), stride=2), torch.float32)
    values = (x.contiguous(memory_format=layout), others[0], *(others[1:] if added else (None, None)))
    moved = (None if value is None else value.to(BACKENDS[backend]) for value in values)
    with fastdiff.use_backend({"conv_bias_residual": backend}):
        torch.library.opcheck(torch.ops.fastdiff.conv_bias_residual.default, (*moved, [2, 2], [1, 1]))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_compiles_without_graph_breaks(layout: torch.memory_format) -> None:
    x, *others = inputs(TYPICAL, torch.float32)
    x = x.contiguous(memory_format=layout)

    def block(x: Tensor, *others: Tensor) -> Tensor:
        return ops.conv_bias_residual(x, *others, stride=1, padding=1) * 2

    out = torch.compile(block, fullgraph=True, backend="aot_eager")(x, *others)
    assert torch.equal(out, block(x, *others))
    assert out.stride() == block(x, *others).stride()


def test_gradients_through_the_reference() -> None:
    conv = Conv(1, 2, 2, (3, 4), stride=2)
    tensors = [value.requires_grad_() for value in inputs(conv, torch.float64)]
    with pytest.raises(InputError, match="conv_bias_residual: an input requires grad"):
        ops.conv_bias_residual(*tensors, stride=2, padding=1)
    with fastdiff.use_backend("reference"):
        assert torch.autograd.gradcheck(lambda *given: ops.conv_bias_residual(*given, stride=2, padding=1), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, r"x has shape \(2, 3, 4\); expected \(N, C, H, W\)"),
        ({"x": torch.zeros(1, 3, 0, 4)}, r"x has shape \(1, 3, 0, 4\); expected \(N, C, H, W\) with C, H and W at"),
        ({"x": torch.zeros(1, 3, 4, 4, dtype=torch.int32)}, "x is torch.int32; expected float32"),
        ({"weight": torch.zeros(2, 3, 3)}, r"weight has shape \(2, 3, 3\); expected \(Cout, 3, R, S\), of a conv"),
        ({"weight": torch.zeros(2, 1, 3, 3)}, r"weight has shape \(2, 1, 3, 3\); expected \(Cout, 3, R, S\)"),
        ({"weight": torch.zeros(0, 3, 3, 3)}, r"weight has shape \(0, 3, 3, 3\)"),
        ({"weight": torch.zeros(2, 3, 5, 7)}, "weight has 7 columns; expected at most the 6 of x with its padding"),
        ({"weight": torch.zeros(2, 3, 3, 3).half()}, r"weight is torch.float16; expected torch.float32 \(as x\)"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\); expected \(2,\)"),
        ({"bias": torch.zeros(2).double()}, r"bias is torch.float64; expected torch.float32 \(as x\)"),
        ({"bias": torch.zeros(2, device="meta")}, "bias is on meta, the first tensor on cpu"),
        ({"residual": torch.zeros(1, 2, 1, 1)}, r"residual has shape \(1, 2, 1, 1\); expected \(1, 2, 4, 4\)"),
        ({"residual": torch.zeros(1, 2, 4, 4).double()}, r"residual is torch.float64; expected torch.float32 \(as x\)"),
        ({"stride": 2}, r"residual has shape \(1, 2, 4, 4\); expected \(1, 2, 2, 2\)"),
        ({"stride": (1, 0)}, r"stride is \(1, 0\); expected an integer of at least 1, or two \(rows, columns\)"),
        ({"stride": (1, 1, 1)}, r"stride is \(1, 1, 1\); expected an integer of at least 1"),
        ({"padding": -1}, "padding is -1; expected an integer of at least 0"),
        ({"padding": "same"}, "padding is 'same'; expected an integer of at least 0"),
        ({"padding": 0.5}, "padding is 0.5; expected an integer of at least 0"),
    ],
)
def test_errors(change: dict[str, Any], message: str) -> None:
    arguments = {
        "x": torch.zeros(1, 3, 4, 4),
        "weight": torch.zeros(2, 3, 3, 3),
        "bias": torch.zeros(2),
        "residual": torch.zeros(1, 2, 4, 4),
        "stride": 1,
        "padding": 1,
        **change,
    }
    with pytest.raises(InputError, match="conv_bias_residual: " + message):
        ops.conv_bias_residual(**arguments)


def test_choice_on_the_cpu() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        faster = "torch" if dtype in onednn_dtypes() else "native"
        said = fastdiff.explain("conv_bias_residual", *inputs(TYPICAL, dtype), padding=1)
        assert said.startswith(f"conv_bias_residual: {faster}\n")
    wide = inputs(TYPICAL, torch.float64)
    assert fastdiff.explain("conv_bias_residual", *wide, padding=1).startswith("conv_bias_residual: torch\n")
    with fastdiff.use_backend("native"), pytest.raises(BackendError, match="not float64"):
        ops.conv_bias_residual(*wide, padding=1)


@pytest.mark.parametrize(
    ("channels", "dtype", "added", "leaves"),
    [
        (320, torch.bfloat16, True, False),
        (640, torch.bfloat16, True, True),
        (320, torch.float32, True, True),
        (320, torch.float16, False, True),
    ],
    ids=["shallow", "deep", "float32", "nothing added"],
)
def test_what_triton_leaves_to_cudnn(channels: int, dtype: torch.dtype, added: bool, leaves: bool) -> None:
    x, weight = torch.zeros(1, channels, 4, 4, dtype=dtype), torch.zeros(8, channels, 3, 3, dtype=dtype)
    residual = torch.zeros(1, 8, 4, 4, dtype=dtype) if added else None
    assert triton.BACKENDS["conv_bias_residual"].cedes(x, weight, None, residual, [1, 1], [1, 1]) == leaves
