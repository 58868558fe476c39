"""Operators in a graph that torch.jit.trace makes: they are in it, and read what it is called with."""

import pytest
import torch

from fastdiff import ops

CALLS = {
    "group_norm_silu": lambda x: ops.group_norm_silu(x, 4),
    "group_norm_silu channels-last": lambda x: ops.group_norm_silu(x.contiguous(memory_format=torch.channels_last), 4),
    "attention": lambda x: ops.attention(x, x + 1, 2 * x),
    "geglu": ops.geglu,
    "layer_norm_modulate": ops.layer_norm_modulate,
    "upsample_conv": lambda x: ops.upsample_conv(x, ops.fold_upsample(torch.ones(5, 8, 3, 3))),
    "conv_bias_residual": lambda x: ops.conv_bias_residual(x, torch.ones(5, 8, 3, 3), None),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_traced_operator_reads_its_input(call):
    first, second = torch.randn(2, 2, 8, 4, 4)
    traced = torch.jit.trace(call, (first,))
    assert any(node.kind().startswith("fastdiff::") for node in traced.graph.nodes())
    torch.testing.assert_close(traced(second), call(second))
