"""fastdiff.accelerate on diffusers' U-Nets: the same function, the same interface, and the way back."""

from __future__ import annotations

import gc
import inspect
import re
import warnings
import weakref
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.models.attention_processor import AttnProcessor, FusedAttnProcessor2_0, SlicedAttnProcessor
from layouts import CASES, SD15, Case
from other_layouts import OTHERS
from tolerance import assert_close_to_truth
from torch import Tensor, nn

import fastdiff
from fastdiff.errors import InputError
from fastdiff.models import UNet
from fastdiff.models.forward import forward
from fastdiff.models.rewrites import Rewrites

FAMILIAR = ("adm", "fourier-times", "learned-times-timestep-classes", "sdxl", "varied", "only-crossed-masked")
ALL = {**{name: CASES[name] for name in FAMILIAR}, **OTHERS}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLAT = torch.contiguous_format


@pytest.fixture(autouse=True)
def _no_record() -> None:
    gc.collect()  # networks of other tests would be in the report
    fastdiff.report(reset=True)


@cache
def theirs(name: str, dtype: torch.dtype) -> Tensor:
    return ALL[name].call(ALL[name].network(), dtype, FLAT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ALL)
def test_the_function_is_the_librarys(name: str, dtype: str) -> None:
    network = fastdiff.accelerate(ALL[name].network(), strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actual = ALL[name].call(network, DTYPES[dtype], FLAT)
    assert ours_ran()
    assert_close_to_truth(actual, theirs(name, torch.float64), theirs(name, DTYPES[dtype]))


def test_without_rewrites_it_is_the_librarys_function() -> None:
    name = "added embeddings"
    network = fastdiff.accelerate(ALL[name].network(), rewrites=(), strict=True)
    assert network.forward.conversion.rewrites == Rewrites.none()
    actual = ALL[name].call(network, torch.float32, FLAT)
    assert_close_to_truth(actual, theirs(name, torch.float64), theirs(name, torch.float32))


def unet(**config: Any) -> nn.Module:
    case = OTHERS["one layer each, odd sizes"]
    return Case(UNet2DConditionModel, {**case.config, **config}).network()


SEEDED = torch.Generator().manual_seed(0)
X, T, TEXT = torch.randn(2, 4, 6, 8, generator=SEEDED), torch.tensor(7), torch.randn(2, 5, 14, generator=SEEDED)


def called(network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return network(*(args or (X, T, TEXT)), **kwargs).sample


def own(network: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """What the library's code gives."""
    with torch.no_grad():
        return type(network).forward(network, *(args or (X, T, TEXT)), **kwargs).sample


def ours_ran() -> bool:
    return any(operator == "group_norm_silu" for operator, _ in fastdiff.report(reset=True).calls)


def test_the_module_stays_what_it_was() -> None:
    network = unet()
    before = {name: (id(p), p.clone()) for name, p in network.named_parameters()}
    keys, config, signature = list(network.state_dict()), dict(network.config), inspect.signature(network.forward)
    state = torch.get_rng_state()
    assert fastdiff.accelerate(network) is network
    assert torch.equal(torch.get_rng_state(), state)
    called(network)
    assert type(network) is UNet2DConditionModel
    assert dict(network.config) == config
    assert list(network.state_dict()) == keys
    assert inspect.signature(network.forward) == signature
    assert {name: id(p) for name, p in network.named_parameters()} == {name: at for name, (at, _) in before.items()}
    assert all(torch.equal(p, before[name][1]) for name, p in network.named_parameters())


def test_outputs_are_the_librarys_objects() -> None:
    network = fastdiff.accelerate(unet())
    plain = fastdiff.accelerate(ALL["one group"].network())
    with torch.no_grad():
        for model, args in ((network, (X, T, TEXT)), (plain, (X[:, :3], 7))):
            expected = type(model).forward(model, *args)
            assert type(model(*args)) is type(expected)
            both = model(*args, return_dict=False)
            assert type(both) is tuple
            torch.testing.assert_close(both[0], expected.sample)
    assert ours_ran()


@pytest.mark.parametrize("t", [3, 2.5, torch.tensor(3), torch.tensor([3]), torch.tensor([3, 9]), torch.tensor(2.5)])
def test_every_form_of_the_timestep(t: Any) -> None:
    network = fastdiff.accelerate(unet(), strict=True)
    torch.testing.assert_close(called(network, X, t, TEXT), own(network, X, t, TEXT))
    assert ours_ran()
    plain = fastdiff.accelerate(ALL["one group"].network(), strict=True)
    torch.testing.assert_close(called(plain, X[:, :3], t), own(plain, X[:, :3], t))
    assert ours_ran()


def test_labels_without_classes_are_overlooked_as_in_the_library() -> None:
    network = fastdiff.accelerate(unet())
    torch.testing.assert_close(called(network, X, T, TEXT, torch.tensor([1, 2])), own(network))
    assert ours_ran()


LEFT: dict[str, tuple[dict[str, Any], str]] = {
    "masks of an IP-Adapter": (
        {"cross_attention_kwargs": lambda: {"ip_adapter_masks": [torch.ones(1, 1, 6, 8)]}},
        "cross_attention_kwargs",
    ),
}


@pytest.mark.parametrize(("arguments", "reason"), LEFT.values(), ids=LEFT)
def test_what_is_not_supported_runs_as_before_and_is_told_once(arguments: dict[str, Any], reason: str) -> None:
    network = fastdiff.accelerate(unet())

    def given() -> dict[str, Any]:
        torch.manual_seed(2)
        return {name: make() for name, make in arguments.items()}

    with pytest.warns(UserWarning, match=reason):
        actual = called(network, X, T, TEXT, **given())
    assert torch.equal(actual, own(network, X, T, TEXT, **given()))
    assert not ours_ran()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        called(network, X, T, TEXT, **given())
    (((name, said), calls),) = fastdiff.report().left.items()
    assert (name, calls) == ("UNet2DConditionModel", 1)
    assert reason in said
    assert reason in str(fastdiff.report())
    called(network, X, T, TEXT, cross_attention_kwargs={"scale": 1.0})
    assert ours_ran(), "the next call is ours again"


WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception]]] = {
    "unknown keyword": ((X, T, TEXT), {"nothing": 1}, TypeError),
    "too few": ((X, T), {}, TypeError),
    "twice": ((X, T, TEXT), {"sample": X}, TypeError),
    "channels": ((X[:, :3], T, TEXT), {}, RuntimeError),
}


@pytest.mark.parametrize(("args", "kwargs", "error"), WRONG.values(), ids=WRONG)
def test_wrong_calls_get_the_librarys_errors(args: Any, kwargs: Any, error: type[Exception]) -> None:
    network = fastdiff.accelerate(unet())
    with pytest.raises(error) as expected:
        own(network, *args, **kwargs)
    with pytest.raises(error) as actual:
        called(network, *args, **kwargs)
    assert str(actual.value) == str(expected.value)


class Foreign:
    """An attention processor that nobody knows."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states * 0.5


def padded(network: Any) -> None:
    network.conv_in.padding_mode = "circular"


OBSTACLES: dict[str, tuple[Any, str]] = {
    "processor": (lambda u: u.set_attn_processor(Foreign()), "attention processor .*Foreign"),
    "fused projections": (lambda u: u.fuse_qkv_projections(), "to_qkv|fused_projections|FusedAttn"),
    "hook": (lambda u: u.mid_block.resnets[0].register_forward_hook(lambda m, a, o: o * 2), "forward hook"),
    "forward": (lambda u: setattr(u.conv_out, "forward", torch.zeros_like), "forward was replaced"),
    "another norm": (lambda u: setattr(u.mid_block.resnets[0], "norm1", nn.Identity()), "Identity, not a GroupNorm"),
    "a scale of its own": (
        lambda u: setattr(u.mid_block.resnets[0], "output_scale_factor", 3.0),
        "output_scale_factor is 3.0",
    ),
    "eps": (lambda u: setattr(u.conv_norm_out, "eps", 0.5), "eps is 0.5"),
    "another activation": (lambda u: setattr(u, "conv_act", nn.GELU()), "GELU, not a SiLU"),
    "seamless": (padded, "padding_mode is 'circular'"),
    "FreeU": (lambda u: u.enable_freeu(0.5, 0.6, 1.4, 1.3), "FreeU"),
    "a part more": (lambda u: u.add_module("fuser", nn.Linear(2, 2)), "fuser"),
}


@pytest.mark.parametrize(("change", "reason"), OBSTACLES.values(), ids=OBSTACLES)
def test_a_network_that_was_changed_runs_as_it_was_changed(change: Any, reason: str) -> None:
    network = unet()
    before = own(network)
    change(network)
    expected = own(network)
    with pytest.raises(InputError, match=reason):
        fastdiff.accelerate(network, strict=True)
    assert forward(network) is None, "strict changes nothing"
    with pytest.warns(UserWarning, match=reason):
        fastdiff.accelerate(network)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has been told
        assert torch.equal(called(network), expected)
    assert [calls for (_, said), calls in fastdiff.report().left.items() if re.search(reason, said)] == [1]
    assert not ours_ran()
    if reason not in ("fuser", "to_qkv|fused_projections|FusedAttn"):
        assert not torch.equal(before, expected), "the change changes something"


LATER = {name: case for name, case in OBSTACLES.items() if name not in ("seamless", "eps", "a scale of its own")}


@pytest.mark.parametrize(("change", "reason"), LATER.values(), ids=LATER)
def test_a_change_after_acceleration_is_seen(change: Any, reason: str) -> None:
    network = fastdiff.accelerate(unet(), strict=True)
    called(network)
    change(network)
    with pytest.warns(UserWarning, match=reason):
        assert torch.equal(called(network), own(network))
    fastdiff.report(reset=True)
    called(network)
    assert not ours_ran()


def test_a_change_that_is_taken_back_is_seen() -> None:
    network = fastdiff.accelerate(unet(), strict=True)
    handle = network.conv_out.register_forward_pre_hook(lambda module, args: None)
    with pytest.warns(UserWarning, match="forward hook"):
        called(network)
    handle.remove()
    called(network)
    assert ours_ran()
    network.enable_freeu(0.5, 0.6, 1.4, 1.3)
    with pytest.warns(UserWarning, match="FreeU"):
        called(network)
    network.disable_freeu()
    fastdiff.report(reset=True)
    called(network)
    assert ours_ran()


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)], ids=["eager", "sliced"])
def test_processors_of_the_same_function_are_fine(processor: Any) -> None:
    network = fastdiff.accelerate(unet(), strict=True)
    network.set_attn_processor(processor)
    torch.testing.assert_close(called(network), own(network), rtol=1e-4, atol=1e-5)
    assert ours_ran()


def test_a_processor_that_reads_other_weights_is_not() -> None:
    network = fastdiff.accelerate(unet(), strict=True)
    network.fuse_qkv_projections()
    assert isinstance(next(iter(network.attn_processors.values())), FusedAttnProcessor2_0)
    with pytest.warns(UserWarning, match="runs as before"):
        assert torch.equal(called(network), own(network))


def test_an_unsupported_configuration_is_left() -> None:
    network = unet(dual_cross_attention=True)
    with pytest.raises(InputError, match=r"strict=True.*dual_cross_attention=True"):
        fastdiff.accelerate(network, strict=True)
    with pytest.warns(UserWarning, match="dual_cross_attention=True"):
        fastdiff.accelerate(network)
    assert "forward" not in vars(network)
    assert any("dual_cross_attention" in reason for _, reason in fastdiff.report().left)


def test_gradients_and_dropout_are_the_librarys() -> None:
    network = fastdiff.accelerate(unet().requires_grad_(True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        network(X, T, TEXT).sample.sum().backward()
        network.requires_grad_(False)
        x = X.clone().requires_grad_(True)
        network(x, T, TEXT).sample.sum().backward()
    assert x.grad is not None
    assert not ours_ran()
    network(X, T, TEXT)
    assert ours_ran(), "grad mode, but nothing has a gradient"
    dropping = fastdiff.accelerate(unet(dropout=0.5)).train()
    torch.manual_seed(1)
    actual = called(dropping)
    torch.manual_seed(1)
    assert torch.equal(actual, own(dropping))
    torch.testing.assert_close(called(dropping.eval()), own(dropping))
    assert ours_ran()


def test_autocast_is_left() -> None:
    network = fastdiff.accelerate(unet())
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match="autocast"):
            actual = called(network)
        assert torch.equal(actual, own(network))


def test_what_is_compiled_is_the_librarys_code() -> None:
    network = fastdiff.accelerate(unet())
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    assert torch.equal(called(compiled), own(network))
    assert not ours_ran()
    torch.compiler.reset()


def test_restore_undoes_it() -> None:
    network = unet()
    expected, held = called(network), set(vars(network))
    assert fastdiff.restore(fastdiff.accelerate(network)) is network
    assert torch.equal(called(network), expected)
    assert set(vars(network)) == held
    assert not ours_ran()
    assert not fastdiff.report().networks
    fastdiff.restore(network)


def test_a_network_that_nobody_holds_is_freed() -> None:
    network = fastdiff.accelerate(unet())
    called(network)
    gone = weakref.ref(network)
    gc.disable()
    try:
        del network
        assert gone() is None
    finally:
        gc.enable()
    assert not fastdiff.report().networks


def test_a_forward_that_was_kept_is_undone_too() -> None:
    network = fastdiff.accelerate(unet())
    kept = network.forward
    fastdiff.restore(network)
    with torch.no_grad():
        assert torch.equal(kept(X, T, TEXT).sample, own(network))
    assert not ours_ran()


def test_twice_is_once_and_changes_the_rewrites() -> None:
    network = fastdiff.accelerate(unet())
    kept = network.forward
    assert fastdiff.accelerate(network, rewrites=["geglu"]).forward is kept
    assert kept.conversion.rewrites == Rewrites.parse(["geglu"])
    torch.testing.assert_close(called(network), own(network))
    assert list(fastdiff.report().networks) == ["UNet2DConditionModel"]


def test_a_network_of_ours_gets_the_rewrites() -> None:
    network = UNet(**SD15)
    assert fastdiff.accelerate(network, rewrites="geglu") is network
    assert network.rewrites == Rewrites.parse("geglu")
    assert fastdiff.restore(network).rewrites == Rewrites()


def test_a_network_of_ours_is_reported_with_its_copies() -> None:
    network = fastdiff.accelerate(UNet(**SD15).requires_grad_(False))
    assert fastdiff.report().networks == {"UNet": 0}
    with torch.no_grad():
        network(X, T, torch.randn(len(X), 5, network.config["cross_attention_dim"]))
    weights = sum(parameter.nbytes for parameter in network.parameters())
    assert weights / 2 < fastdiff.report().networks["UNet"] < 2 * weights
    assert fastdiff.restore(network) is network
    assert not fastdiff.report().networks
    fastdiff.accelerate(network)
    del network
    assert not fastdiff.report().networks


@pytest.mark.parametrize("target", [3, UNet2DModel, object()], ids=["number", "class", "object"])
def test_other_targets_are_refused(target: Any) -> None:
    for function in (fastdiff.accelerate, fastdiff.restore):
        with pytest.raises(InputError, match="expected a pipeline"):
            function(target)


def test_an_unknown_rewrite_is_refused() -> None:
    with pytest.raises(InputError, match="unknown rewrite 'speed'"):
        fastdiff.accelerate(unet(), rewrites=["speed"])
