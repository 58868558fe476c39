"""An accelerated network in the hands of other tools: PEFT's wrapper and hot swaps, offloading, compilers, export."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_module
from layouts import Case
from other_layouts import OTHERS
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from tiny_pipelines import make
from tolerance import relative_error
from torch import Tensor, nn

import fastdiff
from fastdiff.errors import InputError
from fastdiff.models.conversion import entry

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
SEEDED = torch.Generator().manual_seed(0)
X, T, TEXT = torch.randn(2, 4, 6, 8, generator=SEEDED), torch.tensor(7), torch.randn(2, 5, 14, generator=SEEDED)
CASE = Case(diffusers.UNet2DConditionModel, OTHERS["one layer each, odd sizes"].config)
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv_shortcut", "proj_in", "time_emb_proj"]


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield
    torch.compiler.reset()


def unet() -> Any:
    return fastdiff.accelerate(CASE.network(), strict=True)


def output(network: nn.Module) -> Tensor:
    """What a call gives, which ours computed, and which is the library's."""
    fastdiff.report(reset=True)
    actual = network(X, T, TEXT).sample
    assert any(name == "group_norm_silu" for name, _ in fastdiff.report(reset=True).calls)
    assert relative_error(actual, type(network).forward(network, X, T, TEXT).sample) < 1e-5
    return actual


def adapter(seed: int, **settings: Any) -> dict[str, Tensor]:
    """The file of an adapter."""
    network = CASE.network()
    torch.manual_seed(seed)
    network.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, **settings), "one")
    state = get_peft_model_state_dict(network, adapter_name="one")
    return {f"unet.{name}": value.detach().clone() for name, value in state.items()}


def load(network: Any, state: dict[str, Tensor], **how: Any) -> None:
    network.load_lora_adapter(dict(state), adapter_name="one", prefix="unet", **how)


@pytest.mark.parametrize("prepared", [False, True], ids=["as it is", "prepared"])
def test_an_adapter_is_swapped_while_it_is_loaded(prepared: bool) -> None:
    network = unet()
    if prepared:
        network.enable_lora_hotswap(target_rank=4)
    load(network, adapter(1))
    first = output(network)
    load(network, adapter(2), hotswap=True)
    assert relative_error(output(network), first) > 1e-3
    load(network, adapter(1), hotswap=True)
    assert relative_error(output(network), first) < 1e-5


def test_an_adapter_of_magnitudes_and_directions() -> None:
    network = unet()
    plain = output(network)
    load(network, adapter(1, use_dora=True))
    loaded = output(network)
    assert relative_error(loaded, plain) > 1e-3
    network.fuse_lora()
    assert relative_error(output(network), loaded) < 1e-5
    network.unfuse_lora()
    network.unload_lora()
    assert relative_error(output(network), plain) < 1e-5


@pytest.mark.parametrize("kind", [LoHaConfig, LoKrConfig])
def test_other_adapters(kind: Any) -> None:
    network = unet()
    plain = output(network)
    network.add_adapter(kind(r=2, target_modules=TARGETS[:5], init_weights=False), "one")
    assert relative_error(output(network), plain) > 1e-3


def test_pefts_wrapper_in_a_pipeline() -> None:
    """It has a mixin of the library whose models are the text encoders, which are left alone."""
    pipe = copy.deepcopy(make("SD", diffusers.DDIMScheduler()))
    network = pipe.unet
    pipe.unet = get_peft_model(network, LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, 8)
    expected = pipe.unet(x, T, text).sample
    fastdiff.accelerate(pipe, strict=True)
    assert entry(network) is not None
    fastdiff.report(reset=True)
    assert relative_error(pipe.unet(x, T, text).sample, expected) < 1e-5
    assert any(name == "group_norm_silu" for name, _ in fastdiff.report(reset=True).calls)
    fastdiff.restore(pipe)
    assert entry(network) is None


def by_accelerate(network: Any) -> Callable[[], None]:
    cpu_offload(network, execution_device="cpu")
    return lambda: remove_hook_from_module(network, recurse=True)


def by_layers(network: Any) -> Callable[[], None]:
    network.enable_layerwise_casting(storage_dtype=torch.float32, compute_dtype=torch.float32)
    return lambda: None


HOOKS = {"accelerate": (by_accelerate, "AlignDevicesHook"), "diffusers": (by_layers, "LayerwiseCastingHook")}


@pytest.mark.parametrize(("put", "name"), HOOKS.values(), ids=HOOKS)
def test_hooks_of_the_layers_are_named_and_may_go(put: Any, name: str) -> None:
    network, other = unet(), CASE.network()
    put(other)
    with pytest.raises(InputError, match=f"forward was replaced by .*{name}"):
        fastdiff.accelerate(other, strict=True)
    expected = output(network)
    take_away = put(network)
    with pytest.warns(UserWarning, match=f"forward was replaced by .*{name}"):
        assert relative_error(network(X, T, TEXT).sample, expected) < 1e-5
    take_away()
    if put is by_accelerate:
        output(network)


def test_one_network_after_the_other_is_compiled() -> None:
    """The first one is gone when the second is compiled."""
    for _ in range(3):
        network = unet()
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        assert torch.equal(compiled(X, T, TEXT).sample, type(network).forward(network, X, T, TEXT).sample)
        output(network)
        del network, compiled


def test_a_network_that_was_told_to_compile() -> None:
    network = CASE.network()
    network.compile(backend="eager")
    with pytest.raises(InputError, match=r"torch\.compile runs the library's code"):
        fastdiff.accelerate(network, strict=True)
    with pytest.warns(UserWarning, match=r"torch\.compile"):
        fastdiff.accelerate(network)
    assert torch.equal(network(X, T, TEXT).sample, type(network).forward(network, X, T, TEXT).sample)


@pytest.mark.parametrize("strict", [False, True])
def test_what_is_exported_is_the_librarys_code(strict: bool) -> None:
    network, other = unet(), CASE.network()
    output(network)
    program, expected = (torch.export.export(each, (X, T, TEXT), strict=strict) for each in (network, other))
    assert torch.equal(program.module()(X, T, TEXT).sample, expected.module()(X, T, TEXT).sample)
    output(network)
