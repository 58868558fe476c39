"""Weights of an accelerated network that somebody changes: every change takes effect in the next call."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel
from layouts import Case
from other_layouts import OTHERS
from tolerance import relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations, vector_to_parameters

import fastdiff

SEEDED = torch.Generator().manual_seed(0)
X, TEXT = torch.randn(2, 4, 6, 8, generator=SEEDED), torch.randn(2, 5, 14, generator=SEEDED)
TIMES = torch.tensor([900, 500, 7])
CASE = Case(UNet2DConditionModel, OTHERS["one layer each, odd sizes"].config)


def unet() -> Any:
    """An accelerated network that remembers all that there is to remember."""
    network = fastdiff.accelerate(CASE.network(), strict=True)
    run(network)
    return network


@torch.no_grad()
def run(network: nn.Module) -> Tensor:
    """The last output of a run of steps; all are fastdiff's and equal the library's."""
    for t in TIMES:
        fastdiff.report(reset=True)
        actual = network(X, t, TEXT).sample
        assert any(name == "group_norm_silu" for name, _ in fastdiff.report().calls)
    assert relative_error(actual, type(network).forward(network, X, TIMES[-1], TEXT).sample) < 1e-5
    return actual


def scaled(network: nn.Module) -> list[Tensor]:
    return [p.detach() * 1.1 for p in network.parameters()]


def in_place(network: nn.Module) -> None:
    with torch.no_grad():
        for p in network.parameters():
            p.mul_(1.1)


def in_inference_mode(network: nn.Module) -> None:
    with torch.inference_mode():
        for p in network.parameters():
            p.mul_(1.1)


def through_data(network: nn.Module) -> None:
    for p in network.parameters():
        p.data.mul_(1.1)


def through_a_part_of_data(network: nn.Module) -> None:
    for p in network.parameters():
        p.data[:1] *= 1.3


def all_at_once(network: nn.Module) -> None:
    torch._foreach_copy_([p.data for p in network.parameters()], scaled(network))


def other_data(network: nn.Module) -> None:
    for p, value in zip(network.parameters(), scaled(network), strict=True):
        p.data = value


def optimizer(network: nn.Module) -> None:
    network.requires_grad_(True)
    steps = torch.optim.SGD(network.parameters(), lr=1e-3)
    x, text = (each.to(network.dtype) for each in (X, TEXT))
    network(x, TIMES[0], text).sample.square().sum().backward()
    steps.step()
    network.requires_grad_(False)


def loaded(network: nn.Module) -> None:
    network.load_state_dict(dict(zip(network.state_dict(), scaled(network), strict=True)))


def assigned(network: nn.Module) -> None:
    network.load_state_dict(dict(zip(network.state_dict(), scaled(network), strict=True)), assign=True)


def other_dtype_and_back(network: nn.Module) -> None:
    own = network.dtype
    network.double()
    in_place(network)
    network.to(own)


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "in place": in_place,
    "in inference mode": in_inference_mode,
    "data": through_data,
    "a part of data": through_a_part_of_data,
    "all data at once": all_at_once,
    "other data": other_data,
    "optimizer": optimizer,
    "state dict": loaded,
    "state dict assigned": assigned,
    "dtype and back": other_dtype_and_back,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_takes_effect(change: Callable[[nn.Module], None]) -> None:
    network = unet()
    before = run(network)
    change(network)
    assert relative_error(run(network), before) > 1e-3
    middle = run(network)
    change(network)
    assert relative_error(run(network), middle) > 1e-3, "and a second one"


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_takes_effect_in_bfloat16(change: Callable[[nn.Module], None]) -> None:
    """In wider layers, whose products have layouts of their own for it."""
    config = {**CASE.config, "block_out_channels": (32, 64), "norm_num_groups": 8}
    network = fastdiff.accelerate(Case(UNet2DConditionModel, config).network().bfloat16(), strict=True)
    x, text = (each.bfloat16() for each in (X, TEXT))
    before = None
    for _ in range(3):
        with torch.no_grad():
            actual = network(x, TIMES[0], text).sample
            assert relative_error(actual, type(network).forward(network, x, TIMES[0], text).sample) < 0.03
        assert before is None or relative_error(actual, before) > 0.03
        before = actual
        change(network)


@pytest.mark.parametrize("foreach", [False, True], ids=["each", "foreach"])
def test_averaged_weights_are_swapped_in_and_out(foreach: bool) -> None:
    network = unet()
    plain = run(network)
    averaged = EMAModel(network.parameters(), foreach=foreach)
    torch._foreach_mul_(averaged.shadow_params, 1.1)
    for _ in range(2):
        averaged.store(network.parameters())
        averaged.copy_to(network.parameters())
        assert relative_error(run(network), plain) > 1e-3
        averaged.restore(network.parameters())
        assert relative_error(run(network), plain) < 1e-5


def test_parameters_move_inside_one_vector() -> None:
    """The storage stays the same; only the place in it is another."""
    network = unet()
    flat = torch.cat([p.detach().flatten() for p in network.parameters()])
    both = torch.stack([flat, 1.1 * flat])
    vector_to_parameters(both[0], network.parameters())
    before = run(network)
    vector_to_parameters(both[1], network.parameters())
    assert relative_error(run(network), before) > 1e-3


def test_data_that_is_held_is_written_later() -> None:
    network = unet()
    held = [p.data for p in network.parameters()]
    for _ in range(2):
        before = run(network)
        for each in held:
            each.view(-1).mul_(1.1)
        assert relative_error(run(network), before) > 1e-3


def test_other_tensors_data_is_nobodys_business() -> None:
    """What is remembered stays while other tensors are written to."""
    network = unet()
    cache = network.forward.conversion._shared.network.mid_block.attentions[0].transformer_blocks[0].attn2.text
    (kept,) = cache.values()
    other = torch.zeros(8)
    other.data.add_(1.0)
    run(network)
    assert cache.values()[0] is kept
    network.conv_in.weight.data.mul_(1.0)


def test_the_text_is_written_to() -> None:
    network, text = unet(), TEXT.clone()
    with torch.no_grad():
        for write in (lambda: text.mul_(2.0), lambda: text.data.mul_(2.0)):
            before = network(X, TIMES[0], text).sample
            write()
            after = network(X, TIMES[0], text).sample
            assert relative_error(after, before) > 1e-4
            assert relative_error(after, type(network).forward(network, X, TIMES[0], text).sample) < 1e-5


@torch.inference_mode()
def test_in_inference_mode_the_texts_products_are_remembered_while_it_is_the_same() -> None:
    network, text = unet(), TEXT * 1.0
    layer = network.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    cache = network.forward.conversion._shared.network.mid_block.attentions[0].transformer_blocks[0].attn2.text
    network(X, TIMES[0], text)
    kept = cache.values()[-1]
    network(X, TIMES[0], text)
    assert cache.values()[-1] is kept
    before = network(X, TIMES[0], text).sample
    text.mul_(2.0)
    assert relative_error(network(X, TIMES[0], text).sample, before) > 1e-4
    layer.weight.mul_(2.0)
    after = network(X, TIMES[0], text).sample
    assert relative_error(after, type(network).forward(network, X, TIMES[0], text).sample) < 1e-5


def test_tied_weights() -> None:
    network = CASE.network()
    attention = network.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_k.weight = attention.to_q.weight
    network.mid_block.resnets[1] = network.mid_block.resnets[0]
    fastdiff.accelerate(network, strict=True)
    before = run(network)
    attention.to_q.weight.data.mul_(2.0)
    network.mid_block.resnets[0].conv1.weight.data.mul_(2.0)
    assert relative_error(run(network), before) > 1e-4


class Quantized(nn.Module):
    """Whole numbers and a scale, as quantizing libraries put in a Linear's place."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.scale = float(layer.weight.abs().max()) / 127
        self.weight = nn.Parameter((layer.weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def replace(module: nn.Module, make: Callable[[Any], nn.Module]) -> None:
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, make(child))
        else:
            replace(child, make)


def test_quantized_layers() -> None:
    network = unet()
    plain = run(network)
    replace(network, Quantized)
    assert relative_error(run(network), plain) > 1e-4


def test_a_weight_that_is_computed() -> None:
    network = unet()
    parametrizations.weight_norm(network.conv_in)
    plain = run(network)
    network.conv_in.parametrizations.weight.original0.data.mul_(2.0)
    assert relative_error(run(network), plain) > 1e-4


def test_a_copy_has_weights_of_its_own() -> None:
    network = unet()
    copied = copy.deepcopy(network)
    before = run(copied)
    through_data(network)
    assert relative_error(run(copied), before) < 1e-6
    assert relative_error(run(network), before) > 1e-3
