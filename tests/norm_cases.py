"""Arguments of group_norm_silu that its tests share, and how a result is held to the truth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import Target
from inputs import normal
from tolerance import assert_close_to_truth
from torch import Tensor

from fastdiff import ops
from fastdiff.ops import reference

TENSORS = ("weight", "bias", "addend", "residual", "second")


@dataclass(frozen=True)
class Shape:
    size: tuple[int, ...]
    groups: int

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.size))} in {self.groups}"


SHAPES = {
    "usual": Shape((2, 64, 8, 8), 32),
    "ten channels a group": Shape((1, 320, 6, 6), 32),
    "odd": Shape((3, 30, 7, 5), 3),
    "one group": Shape((2, 20, 9, 3), 1),
    "groups of one channel": Shape((2, 12, 5, 5), 12),
    "one channel": Shape((2, 1, 6, 7), 1),
    "one element a group": Shape((2, 8, 1, 1), 8),
    "one pixel": Shape((3, 40, 1, 1), 4),
    "matrix": Shape((3, 48), 4),
    "sequence": Shape((2, 24, 37), 8),
    "volume": Shape((1, 16, 3, 5, 6), 4),
    "wide": Shape((1, 70, 2, 3), 2),
}
LARGE = {
    "large": Shape((2, 16, 40, 33), 2),
    "many positions": Shape((1, 2, 370, 370), 1),
    "many channels": Shape((1, 240, 17, 16), 8),
    "last slab part full": Shape((2, 140, 23, 23), 14),
    "wide group": Shape((1, 300, 12, 12), 1),
    "many groups": Shape((1, 200, 12, 13), 200),
}
"""Several parts, tiles, chunks or slabs in each kernel."""
OPTIONS = {
    "plain": {},
    "no silu": {"silu": False},
    "affine": {"weight": "own", "bias": "own"},
    "float32 affine": {"weight": "float32", "bias": "float32"},
    "weight": {"weight": "own"},
    "bias": {"bias": "float32"},
    "addend": {"addend": "own", "weight": "own", "bias": "own"},
    "float32 addend": {"addend": "float32", "return_sum": True},
    "residual": {"residual": True, "weight": "float32"},
    "sum": {"residual": True, "addend": "own", "return_sum": True, "weight": "own", "bias": "own", "eps": 1e-3},
    "sum of x": {"return_sum": True, "silu": False},
}


CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
LAID_OUT = [pytest.param("contiguous", shape, id=f"contiguous-{name}") for name, shape in SHAPES.items()]
LAID_OUT += [
    pytest.param("channels_last", shape, id=f"channels_last-{name}")
    for name, shape in SHAPES.items()
    if len(shape.size) in CHANNELS_LAST
]


def in_layout(x: Tensor, layout: str) -> Tensor:
    return x.contiguous(memory_format=CHANNELS_LAST[x.dim()]) if layout == "channels_last" else x


def tensors(shape: Shape, dtype: torch.dtype, options: dict[str, Any], mean: float = 0.0) -> dict[str, Any]:
    """The arguments of the operator for `options`, whose tensors are given as "own" (dtype) or "float32"."""
    batch, channels = shape.size[:2]
    sizes = {"weight": (channels,), "bias": (channels,), "addend": (batch, channels), "residual": shape.size}
    made = {"x": normal(*shape.size, seed=1, dtype=dtype, mean=mean)}
    for seed, (name, size) in enumerate(sizes.items(), start=2):
        if name in options:
            made[name] = normal(*size, seed=seed, dtype=torch.float32 if options[name] == "float32" else dtype)
    rest = {name: value for name, value in options.items() if name not in sizes}
    return made | {"groups": shape.groups} | rest


def split(given: dict[str, Any], of_x: int, layout: str) -> dict[str, Any]:
    """The same arguments, the channels of x from `of_x` on being the second input."""
    x, second = (in_layout(part.contiguous(), layout) for part in given["x"].tensor_split([of_x], dim=1))
    return given | {"x": x, "second": second}


def as_one(given: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, the second input in one tensor with x."""
    if "second" not in given:
        return given
    x, second = given["x"], given["second"]
    joined = torch.cat([x, second], dim=1).contiguous(memory_format=reference.memory_format(x, second))
    return {name: value for name, value in given.items() if name != "second"} | {"x": joined}


def plainly(given: dict[str, Any]) -> Tensor:
    """What PyTorch's own functions give in the dtype of x."""
    x, own = given["x"], {name: given[name].to(given["x"].dtype) for name in ("weight", "bias") if name in given}
    if "addend" in given:
        addend = given["addend"].to(x.dtype)
        x = x + addend.reshape(*addend.shape, *[1] * (x.dim() - 2))
    if "residual" in given:
        x = x + given["residual"]
    y = F.group_norm(x, given["groups"], own.get("weight"), own.get("bias"), given.get("eps", 1e-5))
    return F.silu(y) if given.get("silu", True) else y


def schema_arguments(given: dict[str, Any]) -> tuple[Any, ...]:
    """Those of the registered operator, in its order."""
    weight, bias, addend, residual, second = (given.get(name) for name in TENSORS)
    options = (given.get("eps", 1e-5), given.get("silu", True))
    return (
        *(given["x"], given["groups"], weight, bias, *options),
        *(addend, residual, second, given.get("return_sum", False)),
    )


def truth(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in given.items()}
    return reference.group_norm_silu(*schema_arguments(wide | {"return_sum": True}))


def call(target: Target, given: dict[str, Any]) -> Any:
    moved = target.move(given)
    with target.forced():
        return ops.group_norm_silu(moved.pop("x"), moved.pop("groups"), **moved)


def check(target: Target, given: dict[str, Any]) -> Tensor:
    result = call(target, given)
    given = as_one(given)
    x, (true_y, true_h) = given["x"], truth(given)
    y = result[0] if given.get("return_sum") else result
    assert y.dtype == x.dtype
    assert y.stride() == x.stride()
    assert_close_to_truth(y, true_y, plainly(given))
    if given.get("return_sum"):
        h = result[1]
        assert (h.dtype, h.stride()) == (x.dtype, x.stride())
        assert_close_to_truth(h, true_h, true_h.to(x.dtype))
    return y.cpu()
