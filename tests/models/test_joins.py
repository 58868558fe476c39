"""Maps that a layer reads two of are not concatenated, and a block's sum is made by the product that ends it."""

import copy

import pytest
import torch
from tolerance import assert_close_to_truth
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastdiff
from fastdiff.models.rewrites import names

diffusers = pytest.importorskip("diffusers")

TEXT = 24
UNPACKED = tuple(name for name in names() if name != "prepacked")

_SHARED = {"cross_attention_dim": TEXT, "attention_head_dim": 8}
LAYOUTS = {
    "adaptive": {
        **_SHARED,
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        "up_block_types": ("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        "mid_block_type": None,
        "layers_per_block": 2,
        "norm_num_groups": None,
        "time_embedding_dim": 64,
    },
    "transformer": {
        **_SHARED,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "transformer_layers_per_block": (2, 1),
    },
    "linear": {
        **_SHARED,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "use_linear_projection": True,
    },
    "added-keys": {
        **_SHARED,
        "block_out_channels": (32, 64),
        "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "resnet_time_scale_shift": "scale_shift",
    },
}
LEAVES = {
    "conv_shortcut": "up_blocks.1.resnets.0.conv_shortcut",
    "proj_out": "up_blocks.1.attentions.0.proj_out",
    "last": "up_blocks.1.attentions.0.transformer_blocks.0.ff.net.2",
    "to_out": "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_out.0",
}


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def library(layout):
    torch.manual_seed(3)
    model = diffusers.UNet2DConditionModel(sample_size=8, **LAYOUTS[layout]).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
    return model


def arguments(dtype=torch.float32):
    torch.manual_seed(4)
    return torch.randn(2, 4, 8, 12).to(dtype), 7, torch.randn(2, 5, TEXT).to(dtype)


def output(model, dtype=torch.float32):
    return model(*arguments(dtype)).sample


@pytest.fixture(params=["packed", "unpacked"])
def rewrites(request):
    return None if request.param == "packed" else UNPACKED


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_is_the_librarys(layout, dtype, rewrites):
    model = library(layout).to(dtype)
    truth, plain = output(copy.deepcopy(model).double(), torch.float64), output(model, dtype)
    fastdiff.accelerate(model, strict=True, rewrites=rewrites)
    for _ in range(2):
        assert_close_to_truth(output(model, dtype), truth, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_map_is_concatenated(layout, rewrites, monkeypatch):
    model = fastdiff.accelerate(library(layout), strict=True, rewrites=rewrites)
    output(model)  # lays out what is made of the weights
    joined, cat = [], torch.cat

    def noted(tensors, dim=0, **options):
        joined.append(tensors[0].shape)
        return cat(tensors, dim=dim, **options)

    monkeypatch.setattr(torch, "cat", noted)
    output(model)
    assert joined, "the time's waves are"
    assert not [shape for shape in joined if len(shape) == 4]


def additions(model):
    """Shapes of the maps and tokens that an addition of their own is made of."""
    output(model)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        output(model)
    shapes = [event.input_shapes[0] for event in seen.events() if event.name in ("aten::add", "aten::add_")]
    return [shape for shape in shapes if len(shape) == 3 or (len(shape) == 4 and shape[2:] != [1, 1])]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_products_add_every_residual(layout):
    assert not additions(fastdiff.accelerate(library(layout), strict=True))


@pytest.mark.parametrize("layout", ["transformer", "linear"])
def test_tokens_are_never_added_by_themselves(layout):
    """Without packed weights too: what is left are sums beside a stored map, and that which is halved."""
    left = additions(fastdiff.accelerate(library(layout), strict=True, rewrites=UNPACKED))
    assert not [shape for shape in left if len(shape) == 3]
    assert len(left) == 7


@pytest.mark.parametrize("name", ["folded_residual", "add_layer_norm"])
def test_a_rewrite_that_is_off_adds_by_itself(name):
    on = tuple(each for each in names() if each != name)
    model = library("transformer")
    truth, plain = output(copy.deepcopy(model).double(), torch.float64), output(model)
    fastdiff.accelerate(model, strict=True, rewrites=on)
    assert additions(model)
    assert_close_to_truth(output(model), truth, plain)


class Adapted(nn.Module):
    """A layer with something added to its result."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + 0.3 * x.mean()


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_layer_that_is_replaced_is_called(leaf, rewrites):
    path, _, name = LEAVES[leaf].rpartition(".")
    model = library("transformer")
    fastdiff.accelerate(model, strict=True, rewrites=rewrites)
    before = output(model)
    parent = model.get_submodule(path)
    setattr(parent, name, Adapted(parent.get_submodule(name)))
    plain = library("transformer")
    inner = plain.get_submodule(path)
    setattr(inner, name, Adapted(inner.get_submodule(name)))
    assert_close_to_truth(output(model), output(copy.deepcopy(plain).double(), torch.float64), output(plain))
    assert not torch.equal(output(model), before)


@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("leaf", ["proj_out", "last"])
def test_what_is_written_into_a_layer_takes_effect(leaf, part, rewrites):
    model = library("transformer")
    fastdiff.accelerate(model, strict=True, rewrites=rewrites)
    before, plain = output(model), library("transformer")
    for network in (model, plain):
        getattr(network.get_submodule(LEAVES[leaf]), part).mul_(-1.5)
    assert_close_to_truth(output(model), output(copy.deepcopy(plain).double(), torch.float64), output(plain))
    assert not torch.equal(output(model), before)
