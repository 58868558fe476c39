"""How the kernels of group_norm_silu are compiled ahead of time."""

from __future__ import annotations

from typing import Any

import triton

from fastdiff.kernels.aot import AotCase
from fastdiff.kernels.group_norm_plan import plan


def case(kernel: Any, dtype: str, shape: tuple[int, ...], layout: str, *given: str) -> AotCase:
    """`shape`: channels, positions, groups; `given`: those of addend, residual and total that are there.

    A fourth number of the shape: how many of the channels are x's, the rest being those of a second input.
    """
    channels, positions, groups, *of_x = shape
    channels_last = layout == "channels-last"
    statistics = "y" not in kernel.arg_names
    cut = plan(channels, positions, groups, channels_last)
    own = dict.fromkeys(("x", "y", "residual", "second", "total"), f"*{dtype}")
    present = ("x", "y", "weight", "bias", "partial", *given, *("second" for _ in of_x))
    pointers = {name: own.get(name, "*fp32") for name in present if name in kernel.arg_names}
    integers = {"channels": channels, "positions": positions, "groups": groups, "slabs": cut.slabs}
    integers |= {"chunks": cut.chunks, "tiles": cut.tiles}
    integers |= {"position_stride": channels} if channels_last else {"channel_stride": positions}
    for first in of_x:
        strides = (first, channels - first) if channels_last else (1, 1)
        integers |= {"x_channels": first, "x_stride": strides[0], "second_stride": strides[1]}
    integers = {name: value for name, value in integers.items() if name in kernel.arg_names}
    constants = {"SILU": True, "SIZE": channels // groups, "PIECES": cut.pieces, **cut.constants}
    constants |= {"PARTIALS": triton.next_power_of_2(cut.chunks * cut.pieces)}
    constants |= {name: 1 for name in ("channel_stride", "position_stride", *integers) if integers.get(name, 1) == 1}
    types = dict.fromkeys(integers, "i32") | dict.fromkeys(constants, "constexpr") | pointers | {"eps": "fp32"}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    return AotCase(
        name=" ".join((kernel.__name__, dtype, "x".join(map(str, shape)), layout, *given)),
        kernel=kernel,
        signature=signature,
        constexprs={name: constants.get(name) for name, kind in signature.items() if kind == "constexpr"},
        num_warps=cut.warps(4 if dtype == "fp32" else 2, 2 if "total" in given and not statistics else 1),
        divisible=(*pointers, *(name for name, value in integers.items() if types[name] == "i32" and value % 16 == 0)),
        wide_stores=0.0 if statistics else 0.5,
    )
