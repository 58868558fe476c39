"""The picture that a ControlNet goes by is embedded once for a run."""

import copy

import pytest
import torch
from tolerance import assert_close_to_truth

import fastdiff
from fastdiff.models.rewrites import names

diffusers = pytest.importorskip("diffusers")


def condition_calls(network, monkeypatch):
    """How often the picture of what is wanted went through its first convolution."""
    seen = []
    layer = network.controlnet_cond_embedding
    plain = type(layer).forward
    monkeypatch.setattr(type(layer), "forward", lambda self, *args: (seen.append(self), plain(self, *args))[1])
    return seen


@pytest.mark.parametrize("count", [1, 2], ids=["one-for-all", "one-each"])
@pytest.mark.parametrize("cached", [True, False], ids=["cached", "not-cached"])
def test_a_picture_to_go_by_is_embedded_once_for_a_run(cached, count, monkeypatch):
    torch.manual_seed(8)
    config = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "conditioning_embedding_out_channels": (8, 16),
        "cross_attention_dim": 24,
        "attention_head_dim": 8,
        "norm_num_groups": 4,
    }
    plain = diffusers.ControlNetModel(**config).eval().requires_grad_(False)
    for parameter in plain.parameters():
        parameter.data.normal_(0.0, 0.1)
    network = copy.deepcopy(plain)
    rewrites = None if cached else [name for name in names() if name != "text_cache"]
    fastdiff.accelerate(network, strict=True, rewrites=rewrites)
    ours = network.forward.conversion._shared.network
    seen = condition_calls(ours, monkeypatch)
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 24)
    picture = torch.randn(count, 3, 16, 16)

    def check():
        with torch.no_grad():
            given = (sample, 3, text, picture)
            exact = copy.deepcopy(plain).double()(sample.double(), 3, text.double(), picture.double())
            actual, usual = network(*given), plain(*given)
        for name in ("down_block_res_samples", "mid_block_res_sample"):
            for each in zip(*(torch.utils._pytree.tree_leaves(r[name]) for r in (actual, exact, usual)), strict=True):
                assert_close_to_truth(*each)

    for _ in range(3):
        check()
    assert len(seen) == (1 if cached else 3)
    picture.mul_(-2)
    check()
    assert len(seen) == (2 if cached else 4)
    plain.controlnet_cond_embedding.conv_in.weight.mul_(-2)
    network.controlnet_cond_embedding.conv_in.weight.mul_(-2)
    check()
    assert len(seen) == (3 if cached else 5)
