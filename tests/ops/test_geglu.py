"""geglu: a * gelu(b) with x = [a, b] and the exact gelu(b) = b * Phi(b)."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from backends import NATIVE, TARGETS, Target
from inputs import DTYPES, normal
from tolerance import assert_close_to_truth
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.ops import network_reference

# The interpreter is NumPy, which warns of infinities that a kernel means.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

SHAPES = {
    "usual": (2, 16, 160),
    "odd": (3, 7, 74),
    "one element": (1, 2),
    "vector": (26,),
    "rows of one": (2500, 2),
    "many dimensions": (2, 3, 1, 5, 18),
    "whole blocks": (8, 4096),
    "1280 channels": (1, 3, 2560),
    "2560 channels": (2, 2, 5120),
    "long row": (1, 70006),
    "several tasks": (3, 20001 * 2),
}
BANDS = {"lower tail": (-8.0, -1.0), "around zero": (-1e-3, 1e-3), "middle": (-1.0, 1.0), "upper tail": (1.0, 8.0)}


def plainly(x: Tensor) -> Tensor:
    """What PyTorch's own functions give in the dtype of x."""
    a, b = x.chunk(2, dim=-1)
    return a * F.gelu(b)


def call(target: Target, x: Tensor) -> Tensor:
    with target.forced():
        return ops.geglu(target.move(x)).cpu()


def check(target: Target, x: Tensor) -> Tensor:
    y = call(target, x)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert_close_to_truth(y, network_reference.geglu(x.double()), plainly(x))
    return y


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_shapes(target: Target, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check(target, normal(*shape, seed=1, dtype=dtype))


@pytest.mark.parametrize("band", BANDS.values(), ids=BANDS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_gates(target: Target, dtype: torch.dtype, band: tuple[float, float]) -> None:
    gates = torch.linspace(*band, 999, dtype=torch.float64).expand(2, -1)
    check(target, torch.cat([normal(2, 999, dtype=torch.float64), gates], dim=1).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_at_a_mean_of_100_standard_deviations(target: Target, dtype: torch.dtype) -> None:
    for mean in (100.0, -100.0):
        check(target, normal(2, 5, 130, seed=1, dtype=dtype, mean=mean))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_nan_and_infinity_which_reach_their_own_element_only(target: Target, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = normal(3, 200, seed=1, dtype=dtype)
    x[1, 100:107] = torch.tensor([torch.nan, torch.inf, -torch.inf, largest, -largest, 0.0, -0.0])
    x[2, 5:7] = torch.tensor([torch.nan, torch.inf])
    x[1, :100] = x[1, :100].clamp(-0.9, 0.9)
    y = check(target, x)
    expected = network_reference.geglu(x.double())
    assert y.isnan().equal(expected.isnan())
    assert torch.equal(y[1, 3:7].double(), expected[1, 3:7].to(dtype).double())


@pytest.mark.parametrize("target", TARGETS)
def test_truth_of_layouts(target: Target) -> None:
    whole = normal(4, 12, 60, seed=1)
    views = {
        "every second row": whole[:, ::2],
        "some channels": whole[..., 10:50],
        "transposed": whole.transpose(1, 2).contiguous().transpose(1, 2),
        "every second channel": whole[..., ::2],
        "expanded": whole[:1].expand(3, -1, -1),
        "at an odd address": whole.flatten()[1:2641].view(11, 240),
        "no rows": whole[:0],
    }
    for x in views.values():
        check(target, x)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", ["odd", "long row", "several tasks"])
def test_threads_change_no_bit(shape: str, dtype: torch.dtype, many_threads: object) -> None:
    x = normal(*SHAPES[shape], seed=1, dtype=dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(call(NATIVE, x))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_opcheck_and_compile() -> None:
    compiled = torch.compile(ops.geglu, fullgraph=True, backend="aot_eager")
    for name in ("odd", "vector"):
        x = normal(*SHAPES[name], seed=1)
        torch.library.opcheck(torch.ops.fastdiff.geglu.default, (x,))
        torch.testing.assert_close(compiled(x), ops.geglu(x), rtol=0, atol=0)
        turned = x.flip(0).t().contiguous().t() if x.dim() == 2 else x.repeat_interleave(2, -1)[..., ::2]
        torch.testing.assert_close(compiled(turned), ops.geglu(turned), rtol=0, atol=0)


def test_explanation() -> None:
    text = fastdiff.explain("geglu", normal(2, 8))
    assert text.startswith("geglu: native")
    assert "not triton: " in text
    assert "not reference: able, but not preferred" in text
    assert fastdiff.explain("geglu", normal(2, 8).double()).startswith("geglu: reference")


def test_errors() -> None:
    for x, message in (
        (normal(2, 7), r"geglu: x has shape \(2, 7\); expected \(..., 2H\)"),
        (normal(2, 0), r"expected \(..., 2H\)"),
        (torch.tensor(1.0), r"x has shape \(\)"),
        (normal(2, 8).long(), "x is torch.int64; expected float32"),
    ):
        with pytest.raises(InputError, match=message):
            ops.geglu(x)
    with pytest.raises(InputError, match="requires grad"):
        ops.geglu(normal(2, 8).requires_grad_())
