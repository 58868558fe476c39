"""LoRA through PEFT on an accelerated U-Net: every change takes effect in the next call, as in the library's code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from layouts import Case
from other_layouts import OTHERS
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from tolerance import relative_error
from torch import Tensor, nn

import fastdiff

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")

SEEDED = torch.Generator().manual_seed(0)
X, T, TEXT = torch.randn(2, 4, 6, 8, generator=SEEDED), torch.tensor(7), torch.randn(2, 5, 14, generator=SEEDED)
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
EVERYWHERE = [
    *(*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"),
    *("time_emb_proj", "linear_1", "linear_2", "conv_in", "conv_out", "conv"),
]
LINEAR = {"linear": True, "convolutional": False}


def unet(linear: bool = False) -> Any:
    config = {**OTHERS["one layer each, odd sizes"].config, "use_linear_projection": linear}
    return fastdiff.accelerate(Case(UNet2DConditionModel, config).network(), strict=True)


def lora(targets: list[str], rank: int = 2) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, init_lora_weights=False)


def add(network: Any, name: str, targets: list[str] = EVERYWHERE, seed: int = 1) -> None:
    torch.manual_seed(seed)
    network.add_adapter(lora(targets), name)


def output(network: nn.Module) -> Tensor:
    """What a call gives, which is what the library's own code gives and what ours computed."""
    fastdiff.report(reset=True)
    with torch.no_grad():
        actual = network(X, T, TEXT).sample
        assert any(name == "group_norm_silu" for name, _ in fastdiff.report().calls)
        expected = type(network).forward(network, X, T, TEXT).sample
    assert relative_error(actual, expected) < 1e-5
    return actual


def differ(*outputs: Tensor) -> bool:
    return all(relative_error(a, b) > 1e-3 for i, a in enumerate(outputs) for b in outputs[:i])


def alike(one: Tensor, other: Tensor) -> bool:
    return relative_error(one, other) < 1e-5


@pytest.mark.parametrize("linear", LINEAR.values(), ids=LINEAR)
@pytest.mark.parametrize("targets", [ATTENTION, EVERYWHERE], ids=["attention", "everywhere"])
def test_load_scale_fuse_unfuse_unload(targets: list[str], linear: bool) -> None:
    network = unet(linear)
    plain = output(network)
    add(network, "one", targets)
    loaded = output(network)
    network.set_adapters("one", 0.3)
    scaled = output(network)
    assert differ(plain, loaded, scaled)
    network.fuse_lora()
    assert alike(output(network), scaled)
    network.unfuse_lora()
    assert alike(output(network), scaled)
    network.disable_lora()
    assert alike(output(network), plain)
    network.enable_lora()
    assert alike(output(network), scaled)
    network.unload_lora()
    assert alike(output(network), plain)
    assert not any(isinstance(module, BaseTunerLayer) for module in network.modules())


def test_swap_and_several_at_once() -> None:
    network = unet()
    plain = output(network)
    add(network, "one")
    one = output(network)
    add(network, "two", ATTENTION, seed=2)
    network.set_adapters("two")
    two = output(network)
    network.set_adapters(["one", "two"], [0.7, 1.2])
    both = output(network)
    assert differ(plain, one, two, both)
    network.fuse_lora(adapter_names=["two"])
    output(network)
    network.unfuse_lora()
    network.delete_adapters("two")
    network.set_adapters("one")
    assert alike(output(network), one)


def test_loading_from_a_state_dict() -> None:
    network, other = unet(), unet()
    add(other, "one")
    plain = output(network)
    from peft.utils import get_peft_model_state_dict

    state = {f"unet.{name}": value for name, value in get_peft_model_state_dict(other, adapter_name="one").items()}
    network.load_lora_adapter(state, adapter_name="one", prefix="unet", config=None)
    assert differ(plain, output(network))


def test_a_merge_between_two_calls_leaves_nothing_old() -> None:
    """After it the layers are the same objects, with the same versions, as at the last call."""
    network = unet()
    add(network, "one")
    network.unload_lora()
    output(network)
    plain = output(network)
    layer = network.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    version = layer.weight._version
    add(network, "one")
    network.fuse_lora()
    network.unload_lora()
    same = network.mid_block.attentions[0].transformer_blocks[0].attn2.to_k
    assert same is layer
    assert layer.weight._version == version
    assert differ(plain, output(network))


def test_acceleration_of_a_network_that_has_an_adapter() -> None:
    network = fastdiff.restore(unet())
    add(network, "one")
    fastdiff.accelerate(network, strict=True)
    with_it = output(network)
    network.unload_lora()
    assert differ(with_it, output(network))


def test_restore_after_an_adapter_was_loaded() -> None:
    network = unet()
    add(network, "one")
    expected = output(network)
    fastdiff.restore(network)
    with torch.no_grad():
        assert alike(network(X, T, TEXT).sample, expected)
    assert "forward" not in vars(network)


def test_gradients_of_an_adapter_are_the_librarys() -> None:
    network = unet()
    add(network, "one")
    network(X, T, TEXT).sample.sum().backward()
    assert any(p.grad is not None for name, p in network.named_parameters() if "lora" in name)


@pytest.mark.parametrize("scale", [0.5, 0.0])
def test_a_scale_in_the_call_is_that_of_the_adapters(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    network = unet()
    add(network, "one")
    whole = output(network)
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(UNet2DConditionModel, "forward", None)
        scaled = network(X, T, TEXT, cross_attention_kwargs={"scale": scale}).sample
        assert alike(network(X, T, TEXT).sample, whole), "only for that call"
    network.set_adapters("one", scale)
    assert alike(scaled, output(network))
    assert differ(scaled, whole)
