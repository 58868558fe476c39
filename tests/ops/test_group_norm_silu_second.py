"""group_norm_silu of two inputs: concat([x, second]) without the concatenation."""

from __future__ import annotations

import pytest
import torch
from inputs import normal

from fastdiff import ops
from fastdiff.errors import InputError


def test_errors() -> None:
    x, second = normal(2, 8, 4, 4), normal(2, 4, 4, 4)
    last = {"memory_format": torch.channels_last}
    for first, other, options, message in (
        (x, second, {"residual": x}, "residual and second come together"),
        (x, normal(2, 4, 4), {}, r"second has shape \(2, 4, 4\); expected \(2, C2, 4, 4\)"),
        (x, normal(1, 4, 4, 4), {}, r"second has shape \(1, 4, 4, 4\); expected \(2, C2, 4, 4\)"),
        (x, normal(2, 4, 4, 5), {}, r"second has shape \(2, 4, 4, 5\)"),
        (x, normal(2, 0, 4, 4), {}, "with C2 at least 1"),
        (x, second.half(), {}, r"second is torch.float16; expected torch.float32 \(as x\)"),
        (x, second.contiguous(**last), {}, r"pass second.contiguous\(memory_format=torch.contiguous_format\)"),
        (x.contiguous(**last), second, {}, r"pass second.contiguous\(memory_format=torch.channels_last\)"),
        (x, normal(2, 3, 4, 4), {}, "C=11 is not divisible by groups=4"),
        (x, second, {"weight": normal(8)}, r"weight has shape \(8,\); expected \(12,\)"),
        (x, second, {"addend": normal(2, 8)}, r"addend has shape \(2, 8\); expected \(2, 12\)"),
        (x, second.to("meta"), {}, "second is on meta, the first tensor on cpu"),
    ):
        with pytest.raises(InputError, match=message):
            ops.group_norm_silu(first, 4, second=other, **options)
