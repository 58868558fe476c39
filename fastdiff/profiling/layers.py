"""What an event of PyTorch's profiler computes: the operator, its shapes, the operations and bytes that it stands for.

Operations are those of the layer as it is defined, two for each multiplication. An algorithm with fewer (Winograd, or a
doubled map's convolution on the small map) so reaches a rate above the machine's. Bytes are those of every tensor that
the layer reads or writes, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Event", "Layer", "layer"]

_SIZES = {"double": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2}
"""Bytes of an element by the profiler's name of its dtype; what is not here has one."""

_CONVOLUTIONS, _INNER = ("aten::conv2d", "fastdiff::convolve", "fastdiff::convolve_both"), "aten::convolution"
_COPIES = ("aten::copy_", "aten::clone")


@dataclass(frozen=True)
class Event:
    """An operator's call. shapes: of the tensors among its inputs, in their places; others: the inputs that are no
    tensors; sizes: bytes of an element of each input; copies: whether a tensor was copied inside."""

    name: str
    shapes: Sequence[tuple[int, ...]]
    others: Sequence[Any]
    sizes: Sequence[int]
    copies: bool

    @classmethod
    def of(cls, event: Any) -> Event:
        """From `torch.profiler`, which must have recorded shapes."""
        if event.name in _CONVOLUTIONS and event.concrete_inputs[4] is None:
            # A padding in words is not recorded; what is called inside has it in numbers.
            event = next(each for each in _inside(event) if each.name == _INNER)
        shapes = [tuple(shape) for shape in event.input_shapes]
        sizes = [_SIZES.get(name, 1) for name in event.input_dtypes]
        return cls(event.name, shapes, event.concrete_inputs, sizes, _copies(event))

    @property
    def read(self) -> int:
        """Bytes of all tensors."""
        return sum(math.prod(shape) * size for shape, size in zip(self.shapes, self.sizes, strict=True) if shape)

    def moved(self, out: int) -> int:
        """Bytes with those of a result of `out` elements, in the first input's dtype."""
        return self.read + out * self.sizes[0]


@dataclass(frozen=True)
class Layer:
    operator: str
    shape: str
    flops: int = 0
    bytes: int = 0

    @property
    def name(self) -> str:
        return f"{self.operator} {self.shape}".strip()


def layer(event: Event) -> Layer:
    """The layer that the event is a call of."""
    formula = _FORMULAS.get(event.name, _pointwise)
    return formula(event) if event.shapes and event.shapes[0] else Layer(_short(event.name), "")


def _convolution(event: Event) -> Layer:
    x, weight = event.shapes[:2]
    stride, padding, dilation = (_both(value) for value in event.others[3:6])
    groups = event.others[8 if event.name == _INNER else 6]
    return _convolved(event, _size(x[2:], weight[2:], stride, padding, dilation), stride, groups)


def _added(event: Event) -> Layer:
    """fastdiff::conv_bias_residual, whose fourth input is the residual."""
    x, weight = event.shapes[:2]
    stride, padding = (_both(value) for value in event.others[4:6])
    return _convolved(event, _size(x[2:], weight[2:], stride, padding, [1, 1]), stride)


def _size(x: Sequence[int], taps: Sequence[int], *how: Sequence[int]) -> list[int]:
    """Of a convolution's result. how: stride, padding and dilation."""
    return [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(x, taps, *how, strict=True)]


def _doubled(event: Event) -> Layer:
    return _convolved(event, [2 * n for n in event.shapes[0][2:]], [1, 1])


def _convolved(event: Event, size: Sequence[int], stride: Sequence[int], groups: int = 1) -> Layer:
    x, weight = event.shapes[:2]
    pixels = x[0] * math.prod(size)
    step = "" if set(stride) == {1} else f" stride {stride[0]}"
    return Layer(
        f"conv2d {_times(weight[2:])}{step}",
        f"{weight[1] * groups} -> {weight[0]}, {_times((x[0], *size))}",
        2 * pixels * math.prod(weight),
        event.moved(pixels * weight[0]),
    )


def _upsampled(event: Event) -> Layer:
    """fastdiff::upsample_conv, whose weight is (4 outputs, channels, 2, 2): four phases of a 3x3 convolution."""
    x, weight = event.shapes[:2]
    outputs, size = weight[0] // 4, [2 * n for n in x[2:]]
    pixels = x[0] * math.prod(size)
    shape = f"{x[1]} -> {outputs}, {_times((x[0], *size))}"
    return Layer("conv2d 3x3", shape, 2 * pixels * outputs * x[1] * 9, event.moved(pixels * outputs))


def _product(event: Event) -> Layer:
    x = event.shapes[0]
    outputs = sum(shape[0] for shape in event.shapes[1:] if len(shape) > 1)
    return _multiplied(event, math.prod(x[:-1]), x[-1], outputs)


def _matrices(event: Event) -> Layer:
    """aten::addmm, mm, bmm and matmul: their last two matrices."""
    a, b = [shape for shape in event.shapes if len(shape) > 1][-2:]
    return _multiplied(event, math.prod(a[:-1]), a[-1], b[-1])


def _multiplied(event: Event, rows: int, inner: int, outputs: int) -> Layer:
    return Layer(
        "linear", f"{inner} -> {outputs}, {rows} rows", 2 * rows * inner * outputs, event.moved(rows * outputs)
    )


def _attention(event: Event) -> Layer:
    q, k, v = event.shapes[:3]
    flops = 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])
    return Layer("attention", f"{_times(q)}, {k[-2]} keys", flops, event.moved(math.prod(q[:-1]) * v[-1]))


def _normed(event: Event) -> Layer:
    x = event.shapes[0]
    return Layer(_short(event.name), _times(x), 0, event.moved(math.prod(x)))


def _halved(event: Event) -> Layer:
    x = event.shapes[0]
    return Layer(_short(event.name), _times(x), 0, event.moved(math.prod(x) // 2))


def _enlarged(event: Event) -> Layer:
    x = event.shapes[0]
    scales = next((value for value in event.others[2:] if isinstance(value, list)), None)
    size = event.others[1] or [int(n * s) for n, s in zip(x[2:], scales or [1.0, 1.0], strict=True)]
    return Layer(_short(event.name), _times(x), 0, event.moved(math.prod(x[:2]) * math.prod(size)))


def _pointwise(event: Event) -> Layer:
    """An operator of no formula: one that computes its result element by element, or one that only looks."""
    name, shapes = _short(event.name), [shape for shape in event.shapes if shape]
    if _looks(event.name) and not event.copies:
        return Layer(name, "")
    try:
        out = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        out = max(shapes, key=math.prod)
    return Layer(name, _times(shapes[0]), 0, event.moved(math.prod(out)))


_FORMULAS: dict[str, Callable[[Event], Layer]] = {
    **dict.fromkeys((*_CONVOLUTIONS, _INNER), _convolution),
    "fastdiff::conv_bias_residual": _added,
    "fastdiff::convolve_doubled": _doubled,
    "fastdiff::upsample_conv": _upsampled,
    **dict.fromkeys(("aten::linear", "fastdiff::products"), _product),
    **dict.fromkeys(("aten::addmm", "aten::mm", "aten::bmm", "aten::matmul"), _matrices),
    **dict.fromkeys(("aten::scaled_dot_product_attention", "fastdiff::attention"), _attention),
    **dict.fromkeys(("aten::group_norm", "aten::layer_norm", "fastdiff::group_norm_silu"), _normed),
    "fastdiff::layer_norm_modulate": _normed,
    "fastdiff::geglu": _halved,
    "aten::upsample_nearest2d": _enlarged,
}


def _looks(name: str) -> bool:
    """Whether an operator of PyTorch may give a view of its input instead of a new tensor."""
    namespace, _, operator = name.partition("::")
    packet = getattr(torch.ops.aten, operator, None) if namespace == "aten" else None
    if packet is None:
        return False
    return operator in ("reshape", "contiguous", "to", "flatten", "chunk", "split", "unflatten", "dropout") or any(
        getattr(packet, overload).is_view for overload in packet.overloads()
    )


def _copies(event: Any) -> bool:
    return event.name in _COPIES or any(each.name in _COPIES for each in _inside(event))


def _inside(event: Any) -> Iterator[Any]:
    """All events that happened in that one."""
    for child in event.cpu_children:
        yield child
        yield from _inside(child)


def _short(name: str) -> str:
    return name.rpartition("::")[2]


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))


def _both(value: Any) -> Sequence[int]:
    """Of each dimension, where one number may stand for both."""
    value = value if isinstance(value, list) else [value]
    return value if len(value) == 2 else value * 2
