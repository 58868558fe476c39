"""attention: softmax(scale * q k^T + mask) v, one pass over the keys with a running maximum and sum.

The head dimension is split into two powers of two instead of being padded to one (40 = 32 + 8 of 16, 80 = 64 + 16,
160 = 128 + 32). Up to `_ONE_TILE` keys make one tile and need no loop.

Sources: Milakov & Gimelshein, "Online normalizer calculation for softmax", 2018; Dao, "FlashAttention-2", 2023.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdiff.kernels.aot import AotCase

_LOG2E = tl.constexpr(1.4426950408889634)
_LEAST = tl.constexpr(-3.4028234663852886e38)
_ONE_TILE = 128
_NONE, _BOOL, _ADDED = 0, 1, 2


@triton.jit
def _tile(pointer, stride, rows, DIM: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr, LENGTH: tl.constexpr,
          BOUND: tl.constexpr):  # fmt: skip
    """(LENGTH, WIDTH) elements from column FIRST on; zeros past the head dimension and, with BOUND, past `rows`."""
    row = tl.arange(0, LENGTH)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    pointers = pointer + row * stride + FIRST + column
    if BOUND and FIRST + WIDTH > DIM:
        return tl.load(pointers, mask=(row < rows) & (column < DIM - FIRST), other=0.0)
    if BOUND:
        return tl.load(pointers, mask=row < rows, other=0.0)
    if FIRST + WIDTH > DIM:
        return tl.load(pointers, mask=column < DIM - FIRST, other=0.0)
    return tl.load(pointers)


@triton.jit
def _dot(a, b, c, WIDE: tl.constexpr):
    """a b + c in float32; WIDE is for Triton's interpreter, which multiplies bfloat16 as the integers of its bits."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), c, input_precision="ieee")
    return tl.dot(a, b, c, input_precision="ieee")


@triton.jit
def _masked(scores, mask, queries, keys, stride_q, stride_k, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
            MASK: tl.constexpr, BOUND: tl.constexpr):  # fmt: skip
    """Scores in units of log2 with the mask applied; with BOUND, keys past `keys` count as masked."""
    query = tl.arange(0, BLOCK_Q)[:, None]
    key = tl.arange(0, BLOCK_K)[None, :]
    if MASK:
        values = tl.load(mask + query * stride_q + key * stride_k, mask=(query < queries) & (key < keys), other=0)
        if MASK == 1:
            scores = tl.where(values != 0, scores, float("-inf"))
        else:
            # The least float, a common way to mask, stays finite: a row of it is a mean and not zero.
            values = values.to(tl.float32)
            scores += tl.where(values == float("-inf"), values, tl.maximum(values * _LOG2E, _LEAST))
    if BOUND:
        scores = tl.where(key < keys, scores, float("-inf"))
    return scores


@triton.jit
def _attend(q0, q1, k, v, mask, largest, total, out0, out1, queries, keys, stride_k, stride_v, stride_mq, stride_mk,
            factor, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BLOCK_Q: tl.constexpr,
            BLOCK_K: tl.constexpr, MASK: tl.constexpr, BOUND: tl.constexpr, FIRST: tl.constexpr,
            WIDE: tl.constexpr):  # fmt: skip
    """One block of keys: the new maximum, sum and output. With FIRST there is nothing to rescale."""
    k0 = _tile(k, stride_k, keys, DIM, 0, MAIN, BLOCK_K, BOUND)
    scores = _dot(q0, tl.trans(k0), None, WIDE)
    if REST:
        k1 = _tile(k, stride_k, keys, DIM, MAIN, REST, BLOCK_K, BOUND)
        scores = _dot(q1, tl.trans(k1), scores, WIDE)
    scores = _masked(scores * factor, mask, queries, keys, stride_mq, stride_mk, BLOCK_Q, BLOCK_K, MASK, BOUND)
    if FIRST:
        new_largest = tl.max(scores, 1)
    else:
        new_largest = tl.maximum(largest, tl.max(scores, 1))
    # With every key masked the maximum is -inf; 0 in its place gives weights of 0 instead of NaN.
    shift = tl.where(new_largest == float("-inf"), 0.0, new_largest) if MASK else new_largest
    weights = tl.exp2(scores - shift[:, None])
    v0 = _tile(v, stride_v, keys, DIM, 0, MAIN, BLOCK_K, BOUND)
    if FIRST:
        total = tl.sum(weights, 1)
        out0 = _dot(weights.to(v0.dtype), v0, None, WIDE)
    else:
        alpha = tl.exp2(largest - shift)
        total = total * alpha + tl.sum(weights, 1)
        out0 = _dot(weights.to(v0.dtype), v0, out0 * alpha[:, None], WIDE)
    if REST:
        v1 = _tile(v, stride_v, keys, DIM, MAIN, REST, BLOCK_K, BOUND)
        if FIRST:
            out1 = _dot(weights.to(v1.dtype), v1, None, WIDE)
        else:
            out1 = _dot(weights.to(v1.dtype), v1, out1 * alpha[:, None], WIDE)
    return new_largest, total, out0, out1


@triton.jit
def attention_kernel(
    q,  # (batch, heads, queries, DIM), rows of stride 1
    k,  # (batch, heads, keys, DIM), likewise
    v,  # as k
    mask,  # (batch, heads, queries, keys) uint8 or float, or None
    out,  # contiguous (batch, queries, heads, DIM)
    heads,
    queries,
    keys,
    stride_qb, stride_qh, stride_q,
    stride_kb, stride_kh, stride_k,
    stride_vb, stride_vh, stride_v,
    stride_mb, stride_mh, stride_mq, stride_mk,
    factor,  # scale * log2(e)
    DIM: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,  # 0, or what MAIN leaves of DIM, rounded up to a power of two
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL: tl.constexpr,  # 0, or the tile for the keys that whole blocks leave over
    MASK: tl.constexpr,  # 0 none, 1 bool, 2 added
    ALIGN: tl.constexpr,  # divides every stride but the mask's
    WIDE: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(queries, BLOCK_Q)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    first = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_Q
    sample, head = head // heads, head % heads
    if ALIGN > 1:
        # Without the hints a head's offset is taken for odd, and loads go element by element.
        stride_q, stride_k, stride_v = (tl.multiple_of(stride_q, ALIGN), tl.multiple_of(stride_k, ALIGN),
                                        tl.multiple_of(stride_v, ALIGN))  # fmt: skip
    q += tl.multiple_of(sample * stride_qb + head * stride_qh + first * stride_q, ALIGN)
    k += tl.multiple_of(sample * stride_kb + head * stride_kh, ALIGN)
    v += tl.multiple_of(sample * stride_vb + head * stride_vh, ALIGN)
    if MASK:
        mask += sample * stride_mb + head * stride_mh + first * stride_mq
    rows = (queries - first).to(tl.int32)

    q0 = _tile(q, stride_q, rows, DIM, 0, MAIN, BLOCK_Q, True)
    q1 = _tile(q, stride_q, rows, DIM, MAIN, REST, BLOCK_Q, True) if REST else q0
    largest = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    out0 = tl.zeros((BLOCK_Q, MAIN), tl.float32)
    out1 = tl.zeros((BLOCK_Q, REST if REST else 16), tl.float32)
    whole = keys // BLOCK_K if BLOCK_K else 0
    if BLOCK_K:
        for _ in range(whole):
            largest, total, out0, out1 = _attend(
                q0, q1, k, v, mask, largest, total, out0, out1, rows, BLOCK_K, stride_k, stride_v, stride_mq,
                stride_mk, factor, DIM, MAIN, REST, BLOCK_Q, BLOCK_K, MASK, False, False, WIDE)  # fmt: skip
            k += BLOCK_K * stride_k
            v += BLOCK_K * stride_v
            if MASK:
                mask += BLOCK_K * stride_mk
    if TAIL:
        largest, total, out0, out1 = _attend(
            q0, q1, k, v, mask, largest, total, out0, out1, rows, keys - whole * BLOCK_K, stride_k, stride_v,
            stride_mq, stride_mk, factor, DIM, MAIN, REST, BLOCK_Q, TAIL, MASK, True, BLOCK_K == 0,
            WIDE)  # fmt: skip

    inverse = 1.0 / tl.where(total == 0.0, 1.0, total) if MASK else 1.0 / total
    row = tl.arange(0, BLOCK_Q)[:, None]
    column = tl.arange(0, MAIN)[None, :]
    out += ((sample * queries + first) * heads + head) * DIM
    pointers = out + row * (heads * DIM) + column
    tl.store(pointers, out0 * inverse[:, None], mask=(row < rows) & (column < DIM))
    if REST:
        column = tl.arange(0, REST)[None, :]
        pointers = out + row * (heads * DIM) + MAIN + column
        tl.store(pointers, out1 * inverse[:, None], mask=(row < rows) & (column < DIM - MAIN))


def split(dim: int) -> tuple[int, int]:
    """The head dimension as two powers of two of at least 16, or one and 0: whichever pads less."""
    whole = max(16, triton.next_power_of_2(dim))
    main = whole // 2
    rest = max(16, triton.next_power_of_2(dim - main)) if main >= 16 else main
    return (main, rest) if main >= 16 and rest < main else (whole, 0)


def blocks(dim: int, dtype: torch.dtype) -> tuple[int, int, int, int]:
    """Queries and keys of a block, warps, and stages of the pipeline: none spills registers on sm_80, 90 and 100.

    Not yet measured on a GPU.
    """
    if dtype == torch.float32:
        return (32, 32, 4, 2) if dim <= 64 else (32, 16, 4, 2)
    if dim <= 32:
        return (128, 128, 8, 3)
    if dim <= 80:
        return (128, 64, 8, 3)
    if dim <= 128:
        return (128, 64, 8, 2)
    return 64, 32, 8, 2


def _tiles(keys: int, dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """BLOCK_K and TAIL: one tile for few keys, where its scores fit the registers next to the output."""
    block_k = blocks(dim, dtype)[1]
    if keys <= (_ONE_TILE if dtype != torch.float32 and dim <= 128 else block_k):
        return 0, max(16, triton.next_power_of_2(keys))
    rest = keys % block_k
    return block_k, max(16, triton.next_power_of_2(rest)) if rest else 0


def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    out = q.new_empty(batch, queries, heads, dim)
    block_q, _, warps, stages = blocks(dim, q.dtype)
    block_q = min(block_q, max(16, triton.next_power_of_2(queries)))
    block_k, tail = _tiles(keys, dim, q.dtype)
    kind = _NONE if mask is None else _BOOL if mask.dtype == torch.bool else _ADDED
    if mask is not None and kind == _BOOL:
        mask = mask.view(torch.uint8)
    strides = [t.stride(d) for t in (q, k, v) for d in range(3)]
    align = 16 // q.element_size()
    main, rest = split(dim)
    if out.numel() == 0:
        return out.transpose(1, 2)
    attention_kernel[(triton.cdiv(queries, block_q) * batch * heads,)](
        q, k, v, mask, out, heads, queries, keys, *strides, *((0, 0, 0, 0) if mask is None else mask.stride()),
        scale * _LOG2E.value, DIM=dim, MAIN=main, REST=rest, BLOCK_Q=block_q, BLOCK_K=block_k, TAIL=tail, MASK=kind,
        ALIGN=1 if any(stride % align for stride in (*strides, dim)) else align,
        WIDE=q.device.type == "cpu", num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out.transpose(1, 2)


def _case(dtype: torch.dtype, dim: int, *, few_keys: bool = False, mask: int = _NONE) -> AotCase:
    """What `run` launches for 8 joined heads and lengths that are multiples of 64, or for 77 keys."""
    kind = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    block_q, _, warps, stages = blocks(dim, dtype)
    block_k, tail = _tiles(77 if few_keys else 4096, dim, dtype)
    main, rest = split(dim)
    names = attention_kernel.arg_names
    integers = names[names.index("heads") : names.index("factor")]
    constexprs: dict[str, Any] = {
        "DIM": dim, "MAIN": main, "REST": rest, "BLOCK_Q": block_q, "BLOCK_K": block_k,
        "TAIL": tail, "MASK": mask, "ALIGN": 16 // dtype.itemsize, "WIDE": False,
    }  # fmt: skip
    # Heads stand `dim` apart, and only multiples of 16 are known as such; a mask has one stride of 1.
    odd = (
        {"heads"} | ({"stride_qh", "stride_kh", "stride_vh"} if dim % 16 else set()) | ({"keys"} if few_keys else set())
    )
    constexprs |= {"mask": None} if mask == _NONE else {"stride_mk": 1}
    if few_keys and mask != _NONE:
        odd |= {"stride_mb", "stride_mh", "stride_mq"}
    signature = {name: "*" + kind for name in ("q", "k", "v", "out")}
    signature |= {"mask": "*u8" if mask == _BOOL else "*fp32", "factor": "fp32"} | dict.fromkeys(integers, "i32")
    signature = {name: "constexpr" if name in constexprs else signature[name] for name in names}
    return AotCase(
        f"{kind} {dim}" + " 77 keys" * few_keys + ("", " bool mask", " added mask")[mask],
        attention_kernel,
        signature,
        constexprs,
        num_warps=warps,
        num_stages=stages,
        matrix=dtype != torch.float32,
        wide_loads=0.5 if mask == _NONE else 0.3,  # a mask's elements are read where its strides say
        divisible=tuple(n for n in names if n not in odd | set(constexprs)),
    )


AOT: list[AotCase] = [
    *(_case(torch.bfloat16, dim) for dim in (16, 40, 80, 128, 160, 256)),
    *(_case(torch.bfloat16, dim, few_keys=True) for dim in (40, 80, 160)),
    *(_case(torch.bfloat16, dim, mask=_BOOL) for dim in (40, 160)),
    _case(torch.bfloat16, 40, mask=_ADDED, few_keys=True),
    _case(torch.float16, 40),
    *(_case(torch.float32, dim) for dim in (40, 160)),
]
