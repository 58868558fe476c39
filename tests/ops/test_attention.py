"""attention: softmax(scale * q k^T + mask) v."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from backends import CUDA, DEVICE
from inputs import DTYPES, normal
from tolerance import assert_close_to_truth
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.errors import BackendError, InputError
from fastdiff.ops import reference

BACKENDS = tuple(DEVICE)


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.heads}x{self.queries}x{self.keys}x{self.dim}"


SHAPES = [
    Shape(1, 1, 1, 1, 1),
    Shape(2, 2, 33, 33, 8),
    Shape(3, 2, 17, 77, 40),
    Shape(1, 2, 64, 64, 64),
    Shape(1, 1, 49, 49, 33),
    Shape(1, 2, 1, 77, 80),
    Shape(2, 2, 5, 77, 160),
    Shape(2, 2, 8, 50, 72),
    Shape(2, 2, 20, 1, 33),
    Shape(1, 1, 77, 129, 160),
    Shape(1, 1, 16, 40, 256),
]
MASKED = [Shape(2, 2, 19, 150, 40), Shape(1, 1, 67, 263, 80), Shape(2, 2, 5, 150, 40), Shape(2, 2, 19, 1, 40)]
MASKED += [Shape(1, 2, 330, 70, 8)]
LONG = [Shape(1, 3, 129, 1, 40), Shape(2, 1, 129, 300, 40), Shape(1, 1, 130, 263, 80), Shape(1, 1, 3, 1025, 2)]


def heads_first(shape: Shape, length: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(B, H, L, D) as the view of (B, L, H * D) memory that a projection gives."""
    joined = normal(shape.batch, length, shape.heads * shape.dim, seed=seed, dtype=dtype)
    return joined.view(shape.batch, length, shape.heads, shape.dim).transpose(1, 2)


def inputs(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return (
        heads_first(shape, shape.queries, dtype, 1),
        heads_first(shape, shape.keys, dtype, 2),
        heads_first(shape, shape.keys, dtype, 3),
    )


def masks(shape: Shape, dtype: torch.dtype) -> dict[str, Tensor]:
    """Masks of every form; rows 0 of 'rows' and of 'rows_inf' have every key masked."""
    keep = normal(shape.batch, shape.heads, shape.queries, shape.keys, seed=4) > -0.5
    keep[..., 0] = True
    rows = keep.clone()
    rows[:, :, 0] = False
    bias = normal(shape.heads, shape.queries, shape.keys, seed=5, dtype=torch.bfloat16)
    return {
        "bool": keep,
        "padding": keep[:, :1, :1],
        "bool_queries": keep[0, 0, :, :1],
        "bool_transposed": keep.transpose(-1, -2).contiguous().transpose(-1, -2),
        "rows": rows,
        "float": bias.float(),
        "own_dtype": bias.to(dtype),
        "keys_inf": torch.zeros(shape.keys).masked_fill(~keep[0, 0, 0], -torch.inf),
        "rows_inf": torch.zeros(rows.shape).masked_fill(~rows, -torch.inf),
        "rows_least": torch.zeros(rows.shape).masked_fill(~rows, torch.finfo(torch.float32).min),
        "transposed": bias.float().transpose(-1, -2).contiguous().transpose(-1, -2),
    }


def check(backend: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None):
    device = DEVICE[backend]
    # Moving a view to a device would make it dense; the strides are part of the case.
    moved = [t if device == "cpu" else t.transpose(1, 2).to(device).transpose(1, 2) for t in (q, k, v)]
    with fastdiff.use_backend({"attention": backend}):
        out = ops.attention(*moved, mask=None if mask is None else mask.to(device), scale=scale)
    full = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    truth = reference.attention(q.double(), k.double(), v.double(), full, factor)
    plain = F.scaled_dot_product_attention(q, k, v, attn_mask=full, scale=scale)
    assert out.dtype == q.dtype
    assert out.transpose(1, 2).is_contiguous()
    assert_close_to_truth(out.cpu(), truth, plain)
    return out.cpu()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(backend: str, dtype: torch.dtype, shape: Shape) -> None:
    check(backend, *inputs(shape, dtype))


@pytest.mark.parametrize("shape", LONG, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_many_blocks(backend: str, dtype: torch.dtype, shape: Shape) -> None:
    check(backend, *inputs(shape, dtype))


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize("mask", masks(SHAPES[0], torch.float32))
@pytest.mark.parametrize("shape", MASKED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_masks(backend: str, dtype: torch.dtype, shape: Shape, mask: str) -> None:
    if backend == "torch" and CUDA:
        pytest.skip("takes no mask on a GPU")
    value = masks(shape, dtype)[mask]
    out = check(backend, *inputs(shape, dtype), mask=value)
    if mask in ("rows", "rows_inf"):
        assert not out[:, :, 0].any()


@pytest.mark.parametrize("scale", [0.0, 0.02, 1.0, -0.3])
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scales(backend: str, dtype: torch.dtype, masked: bool, scale: float) -> None:
    shape = Shape(1, 1, 20, 140, 16)
    check(backend, *inputs(shape, dtype), mask=masks(shape, dtype)["bool"] if masked else None, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(Shape(1, 1, 16, 140, 8), dtype)
    out = check(backend, 32 * q, 32 * k, v, scale=1.0)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_may_hide_the_largest_logits(backend: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(Shape(1, 1, 16, 200, 8), dtype)
    k[:, :, :150] *= 100
    mask = torch.arange(200) >= 150
    check(backend, q, k, v, mask=mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    q, k, v = (normal(2, 3, 20, 24, seed=seed) for seed in range(3))
    check(backend, q, k, v)
    check(backend, q[:, :, ::2, 3:19], k[:, :, 1::3, :16], v[:, :, 1::3, 8:])
    check(backend, q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3))
    check(backend, q, k[:, :1].expand(-1, 3, -1, -1), v[:1].expand(2, -1, -1, -1))
    packed = normal(2, 20, 3, 3, 8, seed=7)
    check(backend, *(part.transpose(1, 2) for part in packed.unbind(2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str) -> None:
    q, k, v = (normal(0, 2, length, 8).to(DEVICE[backend]) for length in (5, 7, 7))
    with fastdiff.use_backend({"attention": backend}):
        assert ops.attention(q, k, v).shape == (0, 2, 5, 8)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(
    "shape",
    [Shape(2, 3, 70, 130, 40), Shape(1, 1, 300, 20, 8), Shape(3, 1, 5, 130, 40), Shape(1, 1, 59, 150, 40)],
    ids=str,
)
@pytest.mark.usefixtures("many_threads")
def test_threads_do_not_change_a_bit(shape: Shape, dtype: torch.dtype) -> None:
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with fastdiff.use_backend("native"):
            results.append(ops.attention(*inputs(shape, dtype)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_instruction_sets(capability: str) -> None:
    order = ["DEFAULT", "AVX2", "AVX512"]
    if order.index(capability.upper()) >= order.index(fastdiff.ops.native.capability()):
        pytest.skip(f"the other tests run on {fastdiff.ops.native.capability()}")
    code = (
        "import test_attention as t\n"
        f"assert t.fastdiff.ops.native.capability() == {capability.upper()!r}\n"
        "for dtype in t.DTYPES.values():\n"
        "    for shape in (*t.SHAPES, *t.LONG):\n"
        "        t.check('native', *t.inputs(shape, dtype))\n"
        "    for shape in t.MASKED:\n"
        "        for mask in t.masks(shape, dtype).values():\n"
        "            t.check('native', *t.inputs(shape, dtype), mask=mask, scale=-0.2)\n"
    )
    here = os.path.dirname(__file__)
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    environment["PYTHONPATH"] = os.pathsep.join((here, os.path.dirname(here)))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str, masked: bool) -> None:
    shape = Shape(2, 2, 5, 7, 8)
    mask = masks(shape, torch.float32)["bool"].to(DEVICE[backend]) if masked else None
    arguments = (*(t.to(DEVICE[backend]) for t in inputs(shape, torch.float32)), mask, 0.3)
    with fastdiff.use_backend({"attention": backend}):
        torch.library.opcheck(torch.ops.fastdiff.attention.default, arguments)


def test_compiles_without_graph_breaks() -> None:
    q, k, v = inputs(Shape(2, 2, 9, 7, 8), torch.float32)

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v).transpose(1, 2).reshape(2, 9, 16) * 2

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(q, k, v), block(q, k, v))


def test_gradients_through_the_reference() -> None:
    q, k, v = (t.double().requires_grad_() for t in inputs(Shape(1, 2, 3, 4, 5), torch.float32))
    with pytest.raises(InputError, match="attention: an input requires grad"):
        ops.attention(q, k, v)
    with fastdiff.use_backend("reference"):
        assert torch.autograd.gradcheck(ops.attention, (q, k, v))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3, 4)}, r"q has shape \(2, 3, 4\); expected \(B, H, L, D\)"),
        ({"k": torch.zeros(1, 2, 7, 9)}, r"k has shape \(1, 2, 7, 9\); expected \(1, 2, Lk, 8\)"),
        ({"v": torch.zeros(1, 2, 6, 8)}, r"v has shape \(1, 2, 6, 8\); expected \(1, 2, 7, 8\)"),
        ({"k": torch.zeros(1, 2, 7, 8, dtype=torch.float16)}, "k is torch.float16, q is torch.float32"),
        ({"q": torch.zeros(1, 2, 5, 8, dtype=torch.int32)}, "q is torch.int32; expected float32"),
        ({"q": torch.zeros(1, 2, 0, 8)}, "Lq=0 and Lk=7; expected at least one query and one key"),
        ({"mask": torch.zeros(5, 6, dtype=torch.bool)}, r"mask has shape \(5, 6\); expected one broadcastable"),
        ({"mask": torch.zeros(5, 7, dtype=torch.int64)}, "mask is torch.int64; expected bool"),
    ],
)
def test_errors(change: dict[str, Tensor], message: str) -> None:
    arguments = {"q": torch.zeros(1, 2, 5, 8), "k": torch.zeros(1, 2, 7, 8), "v": torch.zeros(1, 2, 7, 8), **change}
    with pytest.raises(InputError, match="attention: " + message):
        ops.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_head_dimension_over_the_limit() -> None:
    with pytest.raises(InputError, match="attention: head dimension is 257; expected 1 to 256"):
        ops.attention(*(torch.zeros(1, 1, 2, 257) for _ in range(3)))


def test_choice_on_the_cpu() -> None:
    for shape in (Shape(1, 2, 9, 64, 8), Shape(1, 2, 1, 64, 160), Shape(1, 2, 64, 1, 256)):
        for dtype in DTYPES.values():
            assert fastdiff.explain("attention", *inputs(shape, dtype)).startswith("attention: native\n")


def test_float64_runs_on_pytorch_and_native_says_why_not() -> None:
    q, k, v = (t.double() for t in inputs(Shape(1, 1, 3, 4, 8), torch.float32))
    explanation = fastdiff.explain("attention", q, k, v)
    assert explanation.startswith("attention: torch")
    assert "not native: it takes float32, float16 and bfloat16, not float64" in explanation
    with fastdiff.use_backend("native"), pytest.raises(BackendError, match="not float64"):
        ops.attention(q, k, v)
