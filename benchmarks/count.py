"""What one forward of a network costs, counted and not timed.

The networks run on fake tensors, which have shapes and layouts but no data: the whole of Stable Diffusion XL is counted
in seconds on any machine. Counted are the operators that PyTorch is asked for:

launches   calls of operators that compute something; views and allocations are free
FLOP       of products: two for each multiplication of a convolution, a linear layer, or attention
bytes      every tensor that such a call reads or writes, once, as it is stored

A convolution's bias is a launch of its own that reads and writes the output, as PyTorch adds it on a GPU.

Convolutions count as they are defined, or as networks of float32 make them on a CPU by Winograd's filtering: then
the products of their tiles count, and not the sums that go in and out of those.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fastdiff.models.winograd import tile

_FREE = ("aten::empty", "aten::new_empty", "aten::lift_fresh", "aten::detach", "aten::_unsafe_view", "aten::alias")
"""Operators without work that their schemas do not show to be views."""

_ONLY_WRITTEN = ("aten::copy_", "aten::fill_", "aten::zero_")
"""Operators that do not read the tensor they write to."""


_ATTENTION = ("fastdiff::attention", "aten::_scaled_dot_product")


@dataclass(frozen=True)
class Cost:
    launches: int = 0
    flops: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.launches + other.launches, self.flops + other.flops, self.bytes + other.bytes)


class Count(TorchDispatchMode):
    """Adds up what is called inside it: `total`, and `operators` by their names. filtered: convolutions count as
    Winograd's filtering makes them."""

    def __init__(self, *, filtered: bool = False) -> None:
        super().__init__()
        self.operators: dict[str, Cost] = {}
        self._filtered = filtered

    @property
    def total(self) -> Cost:
        return sum(self.operators.values(), Cost())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        for name, cost in _costs(func, args, kwargs, out, filtered=self._filtered):
            self.operators[name] = self.operators.get(name, Cost()) + cost
        return out


def count(call: Callable[[], Any], *, filtered: bool = False) -> Count:
    """What the call costs."""
    with torch.no_grad(), Count(filtered=filtered) as counted:
        call()
    return counted


def _costs(func: Any, args: Any, kwargs: Any, out: Any, *, filtered: bool) -> list[tuple[str, Cost]]:
    name = func._schema.name
    if func.is_view or name in _FREE:
        return []
    inputs, outputs = _tensors((args, kwargs)), _tensors(out)
    if not outputs:
        return []
    read = sum(map(_stored, inputs))
    if name in _ONLY_WRITTEN:
        read -= _stored(inputs[0])
    elif name == "aten::embedding":
        # Only the rows that are asked for.
        read = _stored(outputs[0]) + _stored(inputs[1])
    written = sum(map(_stored, outputs))
    flops = (_in_tiles(name, args, out) if filtered else 0) or _flops(func, args, kwargs, out)
    costs = [(name, Cost(1, flops, read + written))]
    if name == "aten::convolution" and args[2] is not None:
        costs.append(("bias of aten::convolution", Cost(1, 0, 2 * written)))
    return costs


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    if func._schema.name.startswith(_ATTENTION):
        q, k, v = args[:3]
        return 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
    if func._schema.name == "fastdiff::upsample_conv":
        # Every pixel of the result is a sum over 2 x 2 pixels of the small map.
        return 2 * out.numel() * args[0].shape[1] * 4
    if func._schema.name == "fastdiff::conv_bias_residual":
        return 2 * out.numel() * args[1][0].numel()
    # A product that is added in place counts as the one that is not.
    plain = getattr(torch.ops.aten, func._schema.name.removeprefix("aten::").rstrip("_"), None)
    formula = flop_registry.get(func._overloadpacket) or flop_registry.get(plain)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


def _in_tiles(name: str, args: Any, out: Any) -> int:
    """The operations of a convolution that is made by Winograd's filtering, 0 for one that is not."""
    doubled = name == "fastdiff::upsample_conv"
    if doubled:
        geometry: tuple[Any, ...] = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    elif name == "fastdiff::conv_bias_residual":
        geometry = (tuple(args[1].shape[2:]), *map(tuple, args[4:6]), (1, 1), 1)
    elif name == "aten::convolution" and not args[6]:
        geometry = (tuple(args[1].shape[2:]), *map(tuple, args[3:6]), args[8])
    else:
        return 0
    x, (outputs, *sides) = args[0], out.shape[1:]
    size = tile(x.shape, outputs, geometry, doubled=doubled)
    if not size:
        return 0
    tiles = len(x) * math.prod(-(-side // size) for side in sides)
    return 2 * (size + 2) ** 2 * tiles * x.shape[1] * outputs


def _tensors(values: Any) -> list[Tensor]:
    """Each tensor once: x * x reads x once."""
    return list({id(value): value for value in tree_leaves(values) if isinstance(value, Tensor)}.values())


def _stored(x: Tensor) -> int:
    """Bytes; a dimension that is only repeated by a stride of 0 is there once."""
    sizes = (size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * x.element_size()
