"""How a kernel is compiled ahead of time, without a GPU: each kernel file lists its cases in `AOT`.

tests/gpu compiles every case for sm_80, sm_90 and sm_100 and reads the machine code: no spills, no stack frame, wide
loads and stores, and tensor-core instructions in matrix kernels. A kernel without a case fails the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AotCase:
    """One specialisation of one kernel, as the launcher would ask for it.

    name: unique, readable ("bf16 masked"). kernel: the function under `@triton.jit`. signature: every argument in the
    kernel's order -> its type ("*fp32", "*bf16", "*i64", "i32", "i64", "fp32", "constexpr"). constexprs: the value of
    each argument of type "constexpr"; None stands for a pointer that is not given, 1 for an integer that the launcher
    passes as 1. divisible: the arguments that are multiples of 16 (pointers: the address in bytes; integers: the
    value); every pointer and int that Triton would find so at run time belongs here, or the code is not what would run.
    matrix: `tl.dot` on float16 or bfloat16 must come out as tensor-core instructions (wgmma on sm_90).
    wide_loads, wide_stores: the least share of the bytes named by global loads (stores) that goes in 16-byte
    instructions or bulk copies; 0 only for a kernel that has nothing wide to read or write.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    num_ctas: int = 1
    matrix: bool = False
    divisible: tuple[str, ...] = ()
    wide_loads: float = 0.5
    wide_stores: float = 0.5
    targets: tuple[int, ...] = (80, 90, 100)
