"""Our DiT against diffusers' DiTTransformer2DModel with the same random weights."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from inputs import normal
from tolerance import assert_close_to_truth, relative_error
from torch import Tensor, nn

from fastdiff import InputError
from fastdiff.models.dit import DiT
from fastdiff.models.patches import positions
from fastdiff.models.rewrites import Rewrites, names
from fastdiff.models.times import locate

SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "small": (SMALL, (2, 4, 8, 8)),
    "one sample, larger": (SMALL, (1, 4, 12, 12)),
    "odd size, three samples": (SMALL, (3, 4, 9, 9)),
    "learned variance, patches of 4": ({**SMALL, "out_channels": 8, "patch_size": 4}, (3, 4, 8, 8)),
    "patches of 3": ({**SMALL, "patch_size": 3, "sample_size": 10, "in_channels": 3}, (2, 3, 10, 10)),
    "affine norm, no bias, one block": (
        {**SMALL, "norm_elementwise_affine": True, "attention_bias": False, "num_layers": 1, "norm_eps": 1e-3},
        (2, 4, 8, 8),
    ),
    "exact gelu, head dim 12": (
        {**SMALL, "activation_fn": "gelu", "attention_head_dim": 12, "num_attention_heads": 3, "dropout": 0.1},
        (2, 4, 8, 8),
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TIMES = torch.tensor([999, 500, 1])


@cache
def library(name: str, dtype: torch.dtype) -> nn.Module:
    """The library's network; every affine parameter is random, so that a forgotten one shows."""
    torch.manual_seed(7)
    network = DiTTransformer2DModel(**CASES[name][0]).eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.normal_(0.2, 0.3)
    return network.to(dtype)


def ours(name: str, dtype: torch.dtype = torch.float32, **rewrites: Any) -> DiT:
    theirs = library(name, dtype)
    network = DiT(**theirs.config).eval().requires_grad_(False).to(dtype)
    network.load_state_dict(theirs.state_dict())
    network.rewrites = Rewrites(**rewrites)
    return network


def inputs(name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shape = CASES[name][1]
    return (
        normal(*shape, dtype=torch.float32).to(dtype),
        TIMES[: shape[0]].clone(),
        torch.tensor([10, 3, 0])[: shape[0]],
    )


@cache
def theirs(name: str, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return library(name, dtype)(*inputs(name, dtype)).sample


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_output_is_as_close_to_the_truth_as_the_library(name, dtype):
    actual = ours(name, DTYPES[dtype])(*inputs(name, DTYPES[dtype]))
    assert actual.dtype == DTYPES[dtype]
    assert_close_to_truth(actual, theirs(name, torch.float64), theirs(name, DTYPES[dtype]))


@pytest.mark.parametrize("rewrites", [Rewrites(), Rewrites.none()], ids=["all", "none"])
@pytest.mark.parametrize("name", CASES)
def test_float64_is_the_same_function(name, rewrites):
    network = ours(name, torch.float64)
    network.rewrites = rewrites
    actual = network(*inputs(name, torch.float64))
    torch.testing.assert_close(actual, theirs(name, torch.float64), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("off", ["add_layer_norm", "qkv", "modulation_cache"])
@pytest.mark.parametrize("name", ["odd size, three samples", "affine norm, no bias, one block"])
def test_each_rewrite_preserves_the_output(name, off):
    assert off in names()
    actual = ours(name, **{off: False})(*inputs(name, torch.float32))
    assert_close_to_truth(actual, theirs(name, torch.float64), theirs(name, torch.float32))


@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (5, 1), (3, 3)])
def test_positions_are_the_librarys(rows, columns):
    expected = get_2d_sincos_pos_embed(16, (rows, columns), base_size=4)
    torch.testing.assert_close(positions(rows, columns, 4, 16), expected.float())


def test_a_rectangle_keeps_its_sides():
    assert ours("small")(normal(1, 4, 9, 12), 5, torch.tensor([1])).shape == (1, 4, 8, 12)


def run(network: nn.Module, times: Tensor, labels: Tensor, x: Tensor) -> list[Tensor]:
    """One call for each step, as pipelines make them: a view of the scheduler's times, expanded to the batch."""
    with torch.no_grad():
        return [network(x, t[None].expand(len(x)), labels) for t in times]


def counted(network: DiT) -> list[int]:
    """How many rows each call of the first block's projection to modulations takes, as they come."""
    rows: list[int] = []
    inner = network.transformer_blocks[0].norm1.emb.timestep_embedder
    original = inner.forward

    def forward(x: Tensor, condition: Tensor | None = None) -> Tensor:
        rows.append(x[..., 0].numel())
        return original(x, condition)

    inner.forward = forward
    return rows


def test_modulations_of_a_run_are_computed_once():
    network = ours("small", torch.float64)
    rows = counted(network)
    x, _, labels = inputs("small", torch.float64)
    times = torch.tensor([900, 700, 500, 300, 100])
    actual = run(network, times, labels, x)
    assert rows == [2, 5], "the first call alone, then all five steps"
    expected = [library("small", torch.float64)(x, t[None].expand(2), labels).sample for t in times]
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("what", ["weight", "labels", "times", "layer"])
def test_a_table_is_made_anew_when_what_it_was_made_of_changes(what):
    network = ours("small", torch.float64)
    x, _, labels = inputs("small", torch.float64)
    labels, times = labels.clone(), torch.tensor([900, 700, 500])
    run(network, times, labels, x)
    block = network.transformer_blocks[1].norm1
    with torch.no_grad():
        if what == "weight":
            block.linear.weight.mul_(1.5)
        elif what == "labels":
            labels.fill_(7)
        elif what == "times":
            times.sub_(3)
        else:
            block.linear = nn.Sequential(copy.deepcopy(block.linear), nn.Hardtanh(-0.2, 0.2))
    actual = run(network, times, labels, x)
    network.rewrites = Rewrites(modulation_cache=False)
    expected = run(network, times, labels, x)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)


def test_labels_joined_anew_for_every_step_get_no_table():
    network = ours("small", torch.float64)
    rows = counted(network)
    x, _, labels = inputs("small", torch.float64)
    with torch.no_grad():
        for t in torch.tensor([900, 700, 500]):
            network(x, t.expand(2), labels.clone())
    assert rows == [2, 2, 2]


def test_a_long_run_gets_no_table(monkeypatch):
    monkeypatch.setattr("fastdiff.models.dit.TABLE_BYTES", 1000)
    network = ours("small", torch.float64)
    rows = counted(network)
    x, _, labels = inputs("small", torch.float64)
    run(network, torch.tensor([900, 700, 500]), labels, x)
    assert rows == [2, 2, 2]


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (lambda v: v[2], 2),
        (lambda v: v[1:][2].expand(4), 3),
        (lambda v: v[::2][1][None].expand(3), 2),
        (lambda v: v[4:5], 4),
        (lambda v: v[1:3], None),
        (lambda v: v, None),
        (lambda v: v[2].clone(), None),
        (lambda v: v[2:3].view(torch.float64), None),
    ],
    ids=["element", "part", "strided", "slice-of-one", "slice", "whole", "copy", "other-dtype"],
)
def test_a_step_is_found_in_its_run(view, expected):
    times = torch.arange(5) * 100
    found = locate(view(times))
    assert (None if found is None else found[1]) == expected
    assert found is None or found[0] is times


def test_labels_are_dropped_in_training_only():
    network = ours("small")
    table = network.transformer_blocks[0].norm1.emb.class_embedder.train()
    torch.manual_seed(0)
    rows = table(torch.full((2000,), 3))
    dropped = (rows == table.embedding_table.weight[10]).all(1).double().mean()
    assert 0.07 < dropped < 0.13
    assert relative_error(table.eval()(torch.tensor([3])), table.embedding_table.weight[3:4]) == 0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"norm_type": "ada_norm"}, "norm_type='ada_norm'"),
        ({"activation_fn": "swiglu"}, "activation_fn='swiglu'"),
        ({"num_embeds_ada_norm": None}, "num_embeds_ada_norm=None"),
        ({"num_layer": 2}, "num_layer=2.*did you mean 'num_layers'"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"sample_size": 1}, "sample_size=1"),
        ({"num_attention_heads": 1, "attention_head_dim": 6}, "multiple of 4"),
        ({"_class_name": "PixArtTransformer2DModel"}, "_class_name='PixArtTransformer2DModel'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_is_named(config, message):
    with pytest.raises(InputError, match=message):
        DiT(**{**SMALL, **config})


@pytest.mark.parametrize(
    ("shape", "t", "labels", "message"),
    [
        ((2, 3, 8, 8), 1, [1, 2], "hidden_states has shape"),
        ((2, 4, 1, 8), 1, [1, 2], "hidden_states has shape"),
        ((2, 4, 8, 8), torch.tensor([1, 2, 3]), [1, 2], r"timestep has shape \(3,\)"),
        ((2, 4, 8, 8), 1, [1], r"class_labels has shape \(1,\)"),
        ((2, 4, 8, 8), 1, [1.0, 2.0], "torch.float32"),
    ],
    ids=["channels", "below-a-patch", "times", "labels", "floating-labels"],
)
def test_inputs_that_do_not_fit_are_named(shape, t, labels, message):
    with pytest.raises(InputError, match=message):
        DiT(**SMALL)(torch.zeros(shape), t, torch.tensor(labels))
