"""The parts of one packed projection are read where they lie."""

from __future__ import annotations

import pytest
from backends import TARGETS, Target
from inputs import normal
from tolerance import assert_close_to_truth
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff import ops


class Copies(TorchDispatchMode):
    """The names of the operators that copy."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name in ("aten::clone", "aten::copy_", "aten::_to_copy", "aten::contiguous"):
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("target", TARGETS)
def test_no_copy_of_queries_keys_and_values(target: Target) -> None:
    packed = target.move({"qkv": normal(2, 9, 3 * 24)})["qkv"]
    q, k, v = (part.unflatten(-1, (3, 8)).transpose(1, 2) for part in packed.split(24, dim=-1))
    with target.forced(), Copies() as copies:
        out = ops.attention(q, k, v)
    assert not copies.seen
    wide = (part.cpu().double() for part in (q, k, v))
    plain = F.scaled_dot_product_attention(*(part.cpu() for part in (q, k, v)))
    assert_close_to_truth(out.cpu(), F.scaled_dot_product_attention(*wide), plain)
