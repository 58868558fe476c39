"""fastdiff.accelerate on diffusers' DiT and ControlNet: the library's results, in its classes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from diffusers import ControlNetModel, DiTTransformer2DModel
from inputs import normal
from models.test_controlnet import CASES as CONTROLNETS
from models.test_controlnet import call as control
from models.test_controlnet import library as controlnet
from models.test_dit import CASES as TRANSFORMERS
from models.test_dit import inputs
from models.test_dit import library as transformer
from tiny_pipelines import dit
from tolerance import assert_close_to_truth

import fastdiff


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_transformer_gives_the_librarys_result(name):
    network = fastdiff.accelerate(copy.deepcopy(transformer(name, torch.float32)), strict=True)
    assert isinstance(network, DiTTransformer2DModel)
    fastdiff.report(reset=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        actual = network(*inputs(name, torch.float32)).sample
        truth, plain = (transformer(name, kind)(*inputs(name, kind)).sample for kind in (torch.float64, torch.float32))
    assert any(operator == "layer_norm_modulate" for operator, _ in fastdiff.report().calls), "our operators ran"
    assert_close_to_truth(actual, truth, plain)


@pytest.mark.parametrize("name", CONTROLNETS)
def test_a_controlnet_gives_the_librarys_results(name):
    network = fastdiff.accelerate(copy.deepcopy(controlnet(name, torch.float32)), strict=True)
    assert isinstance(network, ControlNetModel)
    fastdiff.report(reset=True)
    actual = control(network, name, torch.float32)
    assert any(operator == "group_norm_silu" for operator, _ in fastdiff.report().calls), "our operators ran"
    expected = [control(controlnet(name, kind), name, kind) for kind in (torch.float64, torch.float32)]
    truth, plain = (torch.cat([each.flatten() for each in maps]) for maps in expected)
    assert_close_to_truth(torch.cat([each.flatten() for each in actual]), truth, plain)


def test_both_give_the_librarys_classes():
    network = fastdiff.accelerate(copy.deepcopy(controlnet("small", torch.float32)), strict=True)
    out = network(normal(1, 4, 6, 6), 3, normal(1, 5, 12), normal(1, 3, 12, 12))
    assert type(out).__name__ == "ControlNetOutput"
    assert len(out.down_block_res_samples) == len(network.controlnet_down_blocks)


def test_a_transformer_in_training_is_the_librarys():
    network = fastdiff.accelerate(copy.deepcopy(transformer("small", torch.float32)), strict=True).train()
    fastdiff.report(reset=True)
    with pytest.warns(UserWarning, match="training mode"), torch.no_grad():
        network(*inputs("small", torch.float32))
    assert not fastdiff.report().calls


def test_the_report_tells_of_what_the_library_alone_takes_but_not_of_what_it_refuses():
    network = copy.deepcopy(dit())
    given = {"hidden_states": torch.randn(1, 4, 8, 8), "timestep": torch.tensor([3])}
    with torch.no_grad():
        expected = network(**given, class_labels=torch.tensor([3])).sample
        fastdiff.accelerate(network, strict=True)
        fastdiff.report(reset=True)
        with pytest.raises(RuntimeError):
            network(**given | {"hidden_states": torch.randn(1, 3, 8, 8)}, class_labels=torch.tensor([3]))
        assert fastdiff.report().left == {}
        with pytest.warns(UserWarning, match="arguments that fastdiff's network does not take"):
            actual = network(**given, class_labels=torch.tensor([3], dtype=torch.int32)).sample
    assert torch.equal(actual, expected)
    assert list(fastdiff.report(reset=True).left.values()) == [1]
