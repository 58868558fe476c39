"""Projections laid side by side: still parameters of their own to whoever loads, saves, moves or trains them."""

from __future__ import annotations

import copy
import pickle
import threading
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from accelerate.utils.other import clean_state_dict_for_safetensors
from counting import Counter
from inputs import normal
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastdiff
from fastdiff.models import packing
from fastdiff.models.attention import PackedAttention
from fastdiff.models.caches import Cache
from fastdiff.models.context import Context
from fastdiff.models.rewrites import Rewrites

X, TOKENS = normal(2, 5, 24, seed=1), normal(2, 3, 20, seed=2)


def attention(width: int | None = None, bias: bool = True) -> PackedAttention:
    torch.manual_seed(0)
    return PackedAttention(24, heads=3, head_dim=8, context_channels=width, bias=bias).requires_grad_(False).eval()


def call(module: nn.Module, rewrites: Rewrites | None = None, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return module(X.to(module.to_q.weight.dtype), Context(rewrites or Rewrites()), tokens)


def adjacent(*tensors: Tensor) -> bool:
    ends = [tensor.data_ptr() + tensor.nbytes for tensor in tensors]
    return ends[:-1] == [tensor.data_ptr() for tensor in tensors[1:]]


def projections(module: nn.Module) -> list[Tensor]:
    return [value for name, value in module.named_parameters() if "to_out" not in name]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("crossed", [False, True], ids=["self", "cross"])
def test_one_product_and_no_copy(crossed, bias):
    module, tokens = attention(20 if crossed else None, bias), TOKENS if crossed else None
    rewrites = replace(Rewrites(), text_cache=False)
    parameters = projections(module)
    expected = call(module, Rewrites.none(), tokens)
    versions = [parameter._version for parameter in parameters]
    torch.testing.assert_close(call(module, rewrites, tokens), expected, rtol=1e-5, atol=1e-6)
    assert all(one is other for one, other in zip(parameters, projections(module), strict=True))
    assert versions == [parameter._version for parameter in parameters]
    kinds = [[value for value in parameters if value.dim() == dim][crossed:] for dim in (1, 2)]
    assert [adjacent(*kind) for kind in kinds if kind] == [True] * (1 + bias)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in parameters)
    with Counter() as counter:
        call(module, rewrites, tokens)
    assert counter.products() == (3 if crossed else 2)
    assert not {"clone", "copy_", "contiguous", "cat"} & set(counter.counts)


def test_the_values_are_those_of_three_products():
    leaves = [nn.Linear(6, out).requires_grad_(False) for out in (4, 1, 3)]
    x = normal(2, 3, 6)
    for actual, leaf in zip(packing.product(leaves, x), leaves, strict=True):
        torch.testing.assert_close(actual, leaf(x))


@pytest.mark.parametrize("crossed", [False, True], ids=["self", "cross"])
def test_moved_apart_they_are_packed_again(crossed):
    module, tokens = attention(20 if crossed else None), TOKENS if crossed else None
    before = call(module, None, tokens)
    module.double()
    assert not adjacent(module.to_k.weight, module.to_v.weight)
    call(module, None, None if tokens is None else tokens.double())
    assert adjacent(module.to_k.weight, module.to_v.weight)
    module.float()
    assert torch.equal(call(module, None, tokens), before)
    module.unpack()
    assert not adjacent(module.to_k.weight, module.to_v.weight)
    fresh = attention(20 if crossed else None)
    assert torch.equal(call(module, Rewrites.none(), tokens), call(fresh, Rewrites.none(), tokens))
    module.pack()
    assert adjacent(module.to_k.weight, module.to_v.weight)


def test_saved_and_copied_whole(tmp_path):
    module = attention()
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    call(module)
    safetensors.torch.save_file(module.state_dict(), tmp_path / "all.safetensors")
    safetensors.torch.save_model(module, str(tmp_path / "model.safetensors"))
    torch.save(module.state_dict(), tmp_path / "all.pt")
    kept = clean_state_dict_for_safetensors(module.state_dict())
    states = [
        kept,
        safetensors.torch.load_file(tmp_path / "all.safetensors"),
        safetensors.torch.load_file(tmp_path / "model.safetensors"),
        torch.load(tmp_path / "all.pt"),
        copy.deepcopy(module).state_dict(),
        pickle.loads(pickle.dumps(module)).state_dict(),
    ]
    for state in states:
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], value) for name, value in expected.items())
    size = sum(value.nbytes for value in expected.values())
    assert size < (tmp_path / "all.safetensors").stat().st_size < size + 2000


def test_a_state_dict_is_loaded_into_the_packed():
    module, other = attention(), attention()
    for value in other.parameters():
        value.mul_(2)
    before = call(module)
    for assign in (False, True):
        module.load_state_dict(other.state_dict(), assign=assign)
        assert not torch.allclose(call(module), before)
        assert torch.equal(call(module), call(other))


def test_what_is_written_through_data_is_multiplied():
    """An adapter merged in place, as its library does it."""
    module = attention()
    before = call(module)
    module.to_v.weight.data += 1.0
    after = call(module)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, call(module, Rewrites.none()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.to_k.weight.requires_grad_(),
        lambda module: module.to_k.register_forward_hook(lambda *_: None),
        lambda module: setattr(module.to_k, "bias", None),
        lambda module: setattr(module.to_k, "weight", module.to_v.weight),
        lambda module: module.share_memory(),
        lambda module: nn.utils.parametrizations.weight_norm(module.to_k),
    ],
    ids=["gradient", "hook", "one-bias", "tied", "shared", "parametrized"],
)
def test_what_cannot_be_packed_is_left(change):
    module = attention()
    change(module)
    addresses = [value.data_ptr() for value in projections(module)]
    expected = module(X, Context(Rewrites.none())) if not module.to_k.weight.requires_grad else None
    with fastdiff.use_backend("reference"):
        actual = module(X, Context(Rewrites()))
    assert addresses == [value.data_ptr() for value in projections(module)]
    if expected is not None:
        torch.testing.assert_close(actual, expected)
    else:
        actual.sum().backward()
        assert module.to_k.weight.grad is not None


def test_gradients_reach_every_parameter_after_packing():
    module = attention(20)
    call(module, None, TOKENS)
    module.requires_grad_()
    tokens = TOKENS.clone().requires_grad_()
    with fastdiff.use_backend("reference"):
        module(X, Context(Rewrites()), tokens).square().sum().backward()
    assert all(value.grad.any() for name, value in module.named_parameters() if name != "to_k.bias")
    assert tokens.grad.any()


def test_packed_in_inference_mode_it_still_trains():
    module = attention()
    with torch.inference_mode():
        module(X, Context(Rewrites()))
    assert adjacent(module.to_q.weight, module.to_k.weight, module.to_v.weight)
    module.requires_grad_()
    with fastdiff.use_backend("reference"):
        module(X, Context(Rewrites())).sum().backward()
    assert module.to_v.weight.grad.any()


def test_threads_that_meet_at_the_first_call():
    for crossed in (False, True) * 10:
        module, tokens = attention(20 if crossed else None), TOKENS if crossed else None
        expected, results = call(module, Rewrites.none(), tokens), []
        start = threading.Barrier(4)

        def work(module=module, tokens=tokens, start=start, results=results) -> None:
            start.wait()
            results.extend(call(module, None, tokens) for _ in range(3))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(results) == 12
        for result in results:
            torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)


def test_counted_with_fake_tensors():
    with FakeTensorMode(), torch.no_grad():
        module = PackedAttention(24, heads=3, head_dim=8)
        x = torch.empty(2, 5, 24)
        for rewrites, products in ((Rewrites.none(), 4), (Rewrites(), 2)):
            with Counter() as counter:
                assert module(x, Context(rewrites)).shape == x.shape
            assert counter.products() == products


class TestCache:
    def test_a_storage_taken_away_is_seen(self):
        cache, weight = Cache(), nn.Parameter(torch.ones(1000), requires_grad=False)
        assert cache.get("", [weight], lambda: weight.sum().item()) == 1000
        for value in (2.0, 3.0, 4.0):
            # An allocator likes to give the same address again.
            weight.data = torch.empty(0)
            weight.data = torch.full((1000,), value)
            assert weight._version == 0
            assert cache.get("", [weight], lambda: weight.sum().item()) == 1000 * value

    def test_what_is_moved_while_it_is_read_is_remembered(self):
        cache, weight = Cache(), nn.Parameter(torch.ones(3), requires_grad=False)

        def make() -> int:
            made.append(0)
            weight.data = weight.data.clone() if len(made) == 1 else weight.data
            return len(made)

        made: list[int] = []
        assert [cache.get("", [weight], make) for _ in range(3)] == [1, 1, 1]

    def test_what_is_written_while_it_is_read_is_not(self):
        cache, weight = Cache(), torch.ones(3)
        assert cache.get("", [weight], lambda: weight.add_(1).sum().item()) == 6
        assert cache.get("", [weight], lambda: weight.sum().item()) == 6
        assert cache.get("", [weight], lambda: 0) == 6

    def test_a_copy_is_empty(self):
        cache, weight = Cache(size=1), torch.ones(3)
        cache.get("", [weight], lambda: 1)
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert other.values() == []
            assert other.get("", [weight], lambda: 2) == 2
            assert other.get("a", [weight], lambda: 3) == 3
            assert other.values() == [3]
        assert cache.values() == [1]
