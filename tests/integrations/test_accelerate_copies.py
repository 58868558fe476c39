"""What people do to networks: copies, pickles, files, other dtypes, other weights, hooks around them, threads."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import UNet2DConditionModel
from layouts import Case
from other_layouts import OTHERS
from tolerance import relative_error
from torch import Tensor, nn

import fastdiff
from fastdiff.models.conversion import entry

CONFIG = {**OTHERS["one layer each, odd sizes"].config, "use_linear_projection": True}
SEEDED = torch.Generator().manual_seed(0)
X, T, TEXT = torch.randn(2, 4, 6, 8, generator=SEEDED), torch.tensor(7), torch.randn(2, 5, 14, generator=SEEDED)


def unet() -> Any:
    return fastdiff.accelerate(Case(UNet2DConditionModel, CONFIG).network(), strict=True)


def output(network: nn.Module, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> Tensor:
    fastdiff.report(reset=True)
    x, text = X.to(dtype), TEXT.to(dtype)
    with torch.no_grad():
        actual = network(x, T, text).sample
        assert any(name == "group_norm_silu" for name, _ in fastdiff.report().calls)
        expected = type(network).forward(network, x, T, text).sample
    assert actual.dtype == dtype
    assert relative_error(actual, expected) < tolerance
    return actual


def through_torch(network: Any) -> Any:
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda network: pickle.loads(pickle.dumps(network)),
    "torch.save": through_torch,
}


@pytest.mark.parametrize("called", [False, True], ids=["at once", "after a call"])
@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_is_accelerated_and_stands_alone(make: Callable[[Any], Any], called: bool) -> None:
    network = unet()
    if called:
        output(network)
    copied = make(network)
    expected = output(network)
    assert entry(copied).owner is copied
    assert torch.equal(output(copied), expected)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.1)
    assert torch.equal(output(network), expected)
    assert not torch.equal(output(copied), expected)
    del network
    output(copied)
    fastdiff.restore(copied)
    assert entry(copied) is None


def test_a_part_is_copied_without_the_whole() -> None:
    network = unet()
    block = copy.deepcopy(network.mid_block)
    assert entry(block) is None


def test_saved_and_loaded(tmp_path: Path) -> None:
    network = unet()
    expected = output(network)
    network.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == network.state_dict().keys()
    assert entry(loaded) is None
    assert torch.equal(output(fastdiff.accelerate(loaded, strict=True)), expected)


def test_other_weights_take_effect() -> None:
    network, other = unet(), Case(UNet2DConditionModel, CONFIG).network()
    first = output(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    state = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    network.load_state_dict(state)
    second = output(network)
    assert relative_error(second, first) > 1e-3
    network.load_state_dict({name: 0.9 * tensor for name, tensor in state.items()}, assign=True)
    assert relative_error(output(network), second) > 1e-3
    for parameter in network.parameters():
        parameter.data = 1.1 * parameter.data
    third = output(network)
    assert relative_error(third, second) > 1e-3
    for parameter in network.parameters():
        parameter.data.mul_(0.9)
    fastdiff.accelerate(network)
    assert relative_error(output(network), third) > 1e-3


def test_replaced_parameters_take_effect() -> None:
    network = unet()
    first = output(network)
    network.mid_block.resnets[0].norm1.weight = nn.Parameter(torch.full((20,), 3.0))
    second = output(network)
    network.mid_block.attentions[0].transformer_blocks[0].attn2.to_k = nn.Linear(14, 20, bias=False)
    assert min(relative_error(second, first), relative_error(output(network), second)) > 1e-4


def test_dtypes_and_back() -> None:
    network = unet()
    first = output(network)
    for dtype in (torch.bfloat16, torch.float16):
        output(network.to(dtype), dtype, tolerance=0.05)
    output(network.float().to(memory_format=torch.channels_last), tolerance=1e-5)
    network.load_state_dict(Case(UNet2DConditionModel, CONFIG).network().state_dict())
    assert relative_error(output(network), first) < 1e-5
    with torch.no_grad():
        double = network.double()(X.double(), T, TEXT.double()).sample
    torch.testing.assert_close(double, first.double(), rtol=1e-3, atol=1e-4)


def test_a_hook_on_the_network_goes_on() -> None:
    network, seen = unet(), []
    network.register_forward_pre_hook(lambda module, args: seen.append(len(args)))
    network.register_forward_hook(lambda module, args, result: seen.append(type(result).__name__))
    output(network)
    assert seen == [3, "UNet2DConditionOutput"]


@pytest.mark.parametrize("first", ["hook", "accelerate"])
def test_hooks_that_replace_the_forward(first: str) -> None:
    """Those of the package accelerate, by which pipelines move networks to the device and away."""
    network, seen = Case(UNet2DConditionModel, CONFIG).network(), []

    class Hook(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(module)
            return args, kwargs

    steps = [lambda: add_hook_to_module(network, Hook()), lambda: fastdiff.accelerate(network, strict=True)]
    for step in steps if first == "hook" else steps[::-1]:
        step()
    output(network)
    assert seen == [network]
    remove_hook_from_module(network)
    output(network)
    fastdiff.restore(network)
    assert entry(network) is None
    fastdiff.report(reset=True)
    with torch.no_grad():
        network(X, T, TEXT)
    assert not fastdiff.report().calls


def test_a_forward_of_somebody_elses_is_left() -> None:
    network = Case(UNet2DConditionModel, CONFIG).network()
    network.forward = lambda *args: 3
    with pytest.raises(fastdiff.InputError, match="forward was replaced"):
        fastdiff.accelerate(network, strict=True)
    with pytest.warns(UserWarning, match="forward was replaced"):
        fastdiff.accelerate(network)
    assert network(X) == 3


def test_two_threads_call_one_network() -> None:
    network = unet()
    inputs = [(torch.randn(n, 4, h, 8), torch.tensor(n), torch.randn(n, 5, 14)) for n, h in ((1, 6), (2, 4))]
    with torch.no_grad():
        expected = [type(network).forward(network, *given).sample for given in inputs]
    worst, start = [0.0, 0.0], threading.Barrier(2)

    def work(index: int) -> None:
        start.wait()
        with torch.no_grad():
            for _ in range(15):
                actual = network(*inputs[index]).sample
                worst[index] = max(worst[index], relative_error(actual, expected[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 0 < max(worst) < 1e-5


def test_the_copies_of_a_network_are_counted() -> None:
    network = unet()
    (held,) = [size for name, size in fastdiff.report().networks.items()][-1:]
    output(network)
    output(network)
    kept = list(fastdiff.report().networks.values())[-1]
    assert kept > held
    assert f"{kept} bytes of copies" in str(fastdiff.report())
