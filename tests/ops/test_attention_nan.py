"""Where NaN and infinity go in attention: every path of the CPU kernel treats them as the specification does."""

from __future__ import annotations

import pytest
import torch
from backends import DEVICE
from inputs import normal

import fastdiff
from fastdiff import ops


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize(("queries", "keys"), [(30, 20), (18, 20), (4, 20), (20, 1)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("backend", DEVICE)
def test_nan_reaches_its_own_query_only(backend: str, value: float, queries: int, keys: int) -> None:
    if backend == "torch" and keys == 1:
        pytest.skip("PyTorch's kernel gives the value whatever the score")
    q, k, v = (normal(1, 1, n, 16, seed=seed).to(DEVICE[backend]) for seed, n in enumerate((queries, keys, keys)))
    q[0, 0, -1] = value
    k.abs_()
    with fastdiff.use_backend({"attention": backend}):
        out = ops.attention(q, k, v)
    assert out.isnan().any(-1)[0, 0].nonzero().flatten().tolist() == [queries - 1]


@pytest.mark.parametrize(("queries", "keys"), [(16, 20), (2, 20), (16, 1)])
@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_masked_key_does_not_hide_its_nan(backend: str, queries: int, keys: int) -> None:
    q, k, v = (normal(1, 1, n, 8, seed=seed) for seed, n in enumerate((queries, keys, keys)))
    v[0, 0, -1, 5] = torch.nan
    mask = torch.arange(keys) != keys - 1
    with fastdiff.use_backend({"attention": backend}):
        out = ops.attention(q, k, v, mask=mask)
    assert out[..., 5].isnan().all()
    assert out[..., :5].isfinite().all()
