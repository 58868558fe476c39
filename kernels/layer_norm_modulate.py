"""layer_norm(x + gate * residual) * weight + bias, scaled and shifted; see `fastdiff.ops.layer_norm_modulate`.

A row's C channels are in registers from the one load to the store; a program has several short rows, which may belong
to several samples.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.aot import AotCase

TILE = 2048  # elements of a program, unless one row has more
MAX_CHANNELS = 16384  # of a row; `fastdiff.ops.triton` refuses longer ones


@triton.jit
def _of_sample(pointer, sample, stride, column, mask, MISSING: tl.constexpr):
    """[rows, channels]: a sample's own values as float32, or those of every sample where its stride is 0."""
    if pointer is None:
        return MISSING
    else:
        at = pointer + sample[:, None] * stride + column[None, :]
        return tl.load(at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def layer_norm_kernel(
    x,  # (rows, channels)
    weight,  # (channels,), or None; so is bias
    bias,
    scale,  # (samples, channels) with rows `scale_stride` apart, or None; so are shift and gate
    shift,
    residual,  # as x, or None
    gate,
    y,  # as x
    total,  # as x, or None
    rows,
    positions,  # rows of a sample
    channels,
    scale_stride,
    shift_stride,
    gate_stride,
    eps,
    ROWS: tl.constexpr,  # of a program
    CHANNELS: tl.constexpr,  # the power of 2 that holds the channels
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    sample = (row // positions).to(tl.int64)
    column = tl.arange(0, CHANNELS)
    mask = (row < rows)[:, None] & (column < channels)[None, :]
    at = row.to(tl.int64)[:, None] * channels + column[None, :]

    h = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        added = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
        h += _of_sample(gate, sample, gate_stride, column, mask, 1.0) * added
    # The mean of the distances to the first mean makes up for what that lost to rounding.
    distance = tl.where(mask, h - (tl.sum(h, axis=1) / channels)[:, None], 0.0)
    centred = tl.where(mask, distance - (tl.sum(distance, axis=1) / channels)[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / channels + eps)
    z = centred * inverse[:, None]
    if weight is not None:
        z *= tl.load(weight + column, mask=column < channels, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        z += tl.load(bias + column, mask=column < channels, other=0.0).to(tl.float32)[None, :]
    z = z * (1.0 + _of_sample(scale, sample, scale_stride, column, mask, 0.0))
    z = z + _of_sample(shift, sample, shift_stride, column, mask, 0.0)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=mask)
    if total is not None:
        tl.store(total + at, h.to(total.dtype.element_ty), mask=mask)


def _constants(channels: int) -> dict[str, int]:
    """The tile of a program and its warps: 16 elements for a thread."""
    width = triton.next_power_of_2(channels)
    rows = max(TILE // width, 1)
    return {"ROWS": rows, "CHANNELS": width, "num_warps": min(max(rows * width // 512, 1), 32)}


def run(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    eps: float,
    residual: Tensor | None,
    gate: Tensor | None,
    return_sum: bool,
) -> tuple[Tensor, Tensor]:
    """The registered operator's arguments; launches on the current stream of x's device."""
    x = x.contiguous()
    y, total = torch.empty_like(x), torch.empty_like(x) if return_sum else None
    weight, bias, residual = (None if value is None else value.contiguous() for value in (weight, bias, residual))
    modulations = [
        value if value is None or value.stride(1) == 1 else value.contiguous() for value in (scale, shift, gate)
    ]
    strides = [0 if value is None else value.stride(0) for value in modulations]
    scale, shift, gate = modulations
    channels = x.shape[-1]
    rows = x.numel() // channels
    constants = _constants(channels)
    with torch.cuda.device_of(x):
        layer_norm_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
            x, weight, bias, scale, shift, residual, gate, y, total, rows, rows // len(x), channels, *strides, eps,
            **constants,
        )  # fmt: skip
    return y, x.new_empty(0) if total is None else total


_MODULATION = ("scale", "shift", "gate")


def _case(dtype: str, channels: int, *given: str, own: bool = True) -> AotCase:
    """`given`: those of the optional pointers that are there; own: parameters have x's dtype, else float32."""
    constants = _constants(channels)
    warps = constants.pop("num_warps")
    wide = {"x", "residual", "y", "total"}
    pointers = {name: f"*{dtype if own or name in wide else 'fp32'}" for name in ("x", "y", *given)}
    strides = [f"{name}_stride" for name in _MODULATION if name in given]
    types = pointers | dict.fromkeys(("rows", "positions", "channels", *strides), "i32") | {"eps": "fp32"}
    signature = {name: types.get(name, "constexpr") for name in layer_norm_kernel.arg_names}
    values = constants | {f"{name}_stride": 0 for name in _MODULATION}
    return AotCase(
        name=" ".join((dtype, str(channels), *given, "" if own else "float32 parameters")).strip(),
        kernel=layer_norm_kernel,
        signature=signature,
        constexprs={name: values.get(name) for name, kind in signature.items() if kind == "constexpr"},
        num_warps=warps,
        divisible=(*pointers, "rows", "positions", "channels", *strides),
    )


_AFFINE = ("weight", "bias")
AOT = [
    *(_case(dtype, 320, *_AFFINE, "residual", "total") for dtype in ("fp32", "fp16", "bf16")),
    *(_case(dtype, channels, *_AFFINE) for dtype in ("fp32", "bf16") for channels in (640, 1280)),
    *(_case(dtype, 1152, *_MODULATION, "residual", "total") for dtype in ("fp32", "bf16")),
    _case("bf16", 1280, *_AFFINE, *_MODULATION, "residual", "total", own=False),
    *(_case(dtype, MAX_CHANNELS, *_AFFINE, *_MODULATION, "residual", "total") for dtype in ("fp32", "bf16")),
]
