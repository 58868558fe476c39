"""Every CUDA kernel once, for compute-sanitizer: `compute-sanitizer python tests/gpu/sanitized.py`."""

from __future__ import annotations

import torch

import fastdiff
from fastdiff import ops
from fastdiff.ops.row import KNOWN, NEW_ANCHOR, NEW_HISTORY, NEW_X, ROW_SIZE, VARIANCE

SEEDS = torch.tensor([1, 2], device="cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Vector and odd shapes; one block, a cluster of blocks, and two kernels.
NORMS = (((2, 40, 8, 8), 8), ((2, 6, 5, 3), 3), ((1, 16, 80, 80), 2), ((1, 8, 300, 300), 2), ((1, 9, 67, 61), 1))


def noise(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=layout)
    scale = torch.ones(shape[0], device="cuda")
    ops.philox_normal(SEEDS, shape, dtype=dtype)
    ops.add_noise(x, scale, scale, seeds=SEEDS)
    ops.add_noise(x, scale, scale, noise=x)


def step(shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(shape, device="cuda")
    output = torch.randn((2 * shape[0], *shape[1:]), device="cuda").to(dtype).contiguous(memory_format=layout)
    table = torch.zeros(2, ROW_SIZE, device="cuda")
    for block in (NEW_X, NEW_HISTORY, NEW_ANCHOR):
        table[:, block] = 1.0
    given = {"anchor": x, "history": (x, x, x), "counter": torch.ones(1, dtype=torch.int64, device="cuda")}
    asked = {"new_history": True, "new_anchor": True, "model_input": dtype}
    ops.sampler_step(x, output, table, 0, seeds=SEEDS, **given, **asked)
    ops.sampler_step(x, output[: shape[0]], table, 0, noise=x, **given, **asked)
    table[:, KNOWN] = table[:, VARIANCE] = 0.5
    output = torch.cat([output, output], dim=1).contiguous(memory_format=layout)
    factors = {"weights": torch.ones(shape[0], 2, device="cuda"), "scales": torch.ones(shape[0], 3, device="cuda")}
    for mask in (x[:1, :1], x):
        given["mask"] = mask.clamp(0.0, 1.0)
        ops.sampler_step(x, output, table, 0, seeds=SEEDS, known=x, **factors, **given, **asked)


def norm(shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(shape, device="cuda").to(dtype).contiguous(memory_format=layout)
    weight, addend = torch.ones(shape[1], device="cuda"), torch.ones(shape[:2], device="cuda")
    ops.group_norm_silu(x, groups)
    ops.group_norm_silu(x, groups, weight, weight, addend=addend, residual=x, return_sum=True)
    weight, addend = torch.ones(2 * shape[1], device="cuda"), torch.ones(shape[0], 2 * shape[1], device="cuda")
    ops.group_norm_silu(x, groups, weight, weight, addend=addend, second=x, return_sum=True)


def main() -> None:
    with fastdiff.use_backend("native"):
        for dtype in DTYPES:
            for layout in (torch.contiguous_format, torch.channels_last):
                for shape in ((2, 4, 16, 16), (2, 3, 5, 3)):
                    noise(shape, dtype, layout)
                    step(shape, dtype, layout)
                for shape, groups in NORMS:
                    norm(shape, groups, dtype, layout)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
