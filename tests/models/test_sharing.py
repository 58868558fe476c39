"""Modules of any network: a Sequential with GroupNorm and SiLU in it, networks of diffusers inside, plain leaves."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from other_layouts import OTHERS
from tolerance import assert_close_to_truth
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import fastdiff
from fastdiff.errors import InputError
from fastdiff.models.conversion import entry
from fastdiff.models.forward import forward
from fastdiff.models.leaf import is_plain


class Block(nn.Module):
    """What somebody else's U-Net is made of."""

    def __init__(self, channels: int = 12, groups: int = 3, inplace: bool = False) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.GroupNorm(groups, channels, eps=1e-3),
            nn.SiLU(inplace),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(1, channels),
            nn.SiLU(),
            nn.Dropout(0.0),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def block(**kwargs: Any) -> Block:
    torch.manual_seed(1)
    made = Block(**kwargs).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0.3, 0.5)
    return made


SEEDED = torch.Generator().manual_seed(0)
X = torch.randn(2, 12, 7, 5, generator=SEEDED)


def called(module: nn.Module, x: Tensor = X) -> Tensor:
    fastdiff.report(reset=True)
    with torch.no_grad():
        return module(x)


def fused() -> int:
    return sum(count for (name, _), count in fastdiff.report().calls.items() if name == "group_norm_silu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_pairs_are_one_operator(dtype: torch.dtype, inplace: bool) -> None:
    module = block(inplace=inplace).to(dtype)
    plain, truth = called(module, X.to(dtype)), called(copy.deepcopy(module).double(), X.to(dtype).double())
    keys, x = list(module.state_dict()), X.to(dtype)
    assert fastdiff.accelerate(module, strict=True) is module
    assert_close_to_truth(called(module, x), truth, plain)
    assert fused() == 2
    assert torch.equal(x, X.to(dtype))
    assert list(module.state_dict()) == keys
    fastdiff.restore(module)
    assert torch.equal(called(module, X.to(dtype)), plain)
    assert fused() == 0


def test_what_the_caller_does_with_the_members_stays() -> None:
    """Indexing, slicing and iterating see members that do what they always did."""
    module = block()
    norm = called(module.inner[0])
    fastdiff.accelerate(module)
    assert torch.equal(called(module.inner[0]), norm)
    assert torch.equal(called(module.inner[:1]), norm)
    assert torch.equal(called(module.inner[1], norm), torch.nn.functional.silu(norm))


CHANGES: dict[str, tuple[Any, int]] = {
    "hook": (lambda m: m.inner[0].register_forward_hook(lambda module, args, out: 2 * out), 1),
    "another activation": (lambda m: m.inner.__setitem__(1, nn.GELU()), 1),
    "a subclass": (lambda m: m.inner.__setitem__(1, type("Mine", (nn.SiLU,), {"forward": lambda s, x: x})()), 1),
    "a forward": (lambda m: setattr(m.inner[1], "forward", torch.relu), 1),
    "no parameters": (lambda m: m.inner.__setitem__(0, nn.GroupNorm(3, 12, affine=False)), 2),
    "in between": (lambda m: m.inner.insert(1, nn.Tanh()), 1),
    "new weights": (lambda m: m.inner[0].load_state_dict({"weight": torch.ones(12), "bias": torch.zeros(12)}), 2),
    "another norm": (lambda m: m.inner.__setitem__(0, nn.GroupNorm(4, 12)), 2),
}


@pytest.mark.parametrize(("change", "count"), CHANGES.values(), ids=CHANGES)
def test_a_change_takes_effect(change: Any, count: int) -> None:
    module = fastdiff.accelerate(block())
    before = called(module)
    change(module)
    plain = fastdiff.restore(copy.deepcopy(module))
    expected = called(plain)
    torch.testing.assert_close(called(module), expected, rtol=1e-5, atol=1e-5)
    assert fused() == count
    assert not torch.allclose(before, expected)


def test_gradients_and_other_dtypes_are_pytorchs() -> None:
    module = fastdiff.accelerate(block())
    module(X).sum().backward()
    assert module.inner[0].weight.grad is not None
    plain = fastdiff.restore(copy.deepcopy(module))
    assert torch.equal(called(module.double(), X.double()), called(plain.double(), X.double()))
    assert fused() == 0


def test_copies_are_accelerated_and_stand_alone() -> None:
    module = fastdiff.accelerate(block())
    expected = called(module)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            copied.inner[0].weight.mul_(2.0)
        assert not torch.equal(called(copied), expected)
        assert fused() == 2
        assert forward(copied.inner).owner is copied.inner
    assert torch.equal(called(module), expected)


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.GroupNorm(1, 2), nn.ReLU(), nn.SiLU()),
        nn.ModuleList([nn.GroupNorm(1, 2), nn.SiLU()]),
        type("Own", (nn.Sequential,), {"forward": lambda self, x: self[0](x)})(nn.GroupNorm(1, 2), nn.SiLU()),
    ],
    ids=["no pair", "a list", "a class of its own"],
)
def test_what_cannot_be_proved_is_left(module: nn.Module) -> None:
    with pytest.raises(InputError, match=r"strict=True.*no network"):
        fastdiff.accelerate(module, strict=True)
    with pytest.warns(UserWarning, match="runs as before"):
        fastdiff.accelerate(module)
    assert all(forward(inner) is None for inner in module.modules())


def test_a_network_inside_a_module_is_found() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = OTHERS["one group"].network()

        def forward(self, x: Tensor) -> Tensor:
            return self.unet(x, 3).sample

    wrapped = Wrapped()
    x = torch.randn(1, 3, 8, 8)
    expected = called(wrapped, x)
    fastdiff.accelerate(wrapped, strict=True)
    assert isinstance(wrapped.unet, UNet2DModel)
    torch.testing.assert_close(called(wrapped, x), expected, rtol=1e-5, atol=1e-5)
    assert fused() > 0
    fastdiff.restore(wrapped)
    assert entry(wrapped.unet) is None


LEAVES: dict[str, tuple[Any, bool]] = {
    "linear": (lambda: nn.Linear(2, 2), True),
    "convolution": (lambda: nn.Conv2d(2, 2, 3), True),
    "no bias": (lambda: nn.Linear(2, 2, bias=False), True),
    "circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), False),
    "norm": (lambda: nn.LayerNorm(2), False),
    "weight norm": (lambda: weight_norm(nn.Linear(2, 2)), False),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), False),
    "transposed": (lambda: nn.ConvTranspose2d(2, 2, 3), False),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(("make", "plain"), LEAVES.values(), ids=LEAVES)
def test_plain_leaves(make: Any, plain: bool) -> None:
    assert is_plain(make()) == plain


def test_a_leaf_with_a_hook_or_a_method_of_its_own_is_not_plain() -> None:
    for name in ("forward", "_conv_forward"):
        leaf = nn.Conv2d(2, 2, 3)
        setattr(leaf, name, lambda *args: 0)
        assert not is_plain(leaf)
    leaf = nn.Linear(2, 2)
    handle = leaf.register_forward_pre_hook(lambda module, args: None)
    assert not is_plain(leaf)
    handle.remove()
    assert is_plain(leaf)
