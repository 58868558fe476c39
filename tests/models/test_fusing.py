"""Modules of somebody else's network whose meaning can be proved: what is one operator, and what is left."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch as th
from tolerance import assert_close_to_truth
from torch import Tensor, nn
from torch.nn import functional as F

import fastdiff
from fastdiff.errors import InputError
from fastdiff.models.forward import forward


class Norm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


class NamedNorm(nn.GroupNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(4, channels, eps=1e-6)


class Swish(nn.Module):
    def forward(self, value):
        """The activation of many early networks."""
        return value * th.sigmoid(value)


class Gated(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * channels)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class Steps(nn.Sequential):
    """A Sequential of another name."""


class ForeignBlock(nn.Module):
    """What the U-Nets of several projects have in one block."""

    def __init__(self, channels: int = 12) -> None:
        super().__init__()
        self.first = nn.Sequential(Norm32(3, channels), Swish(), nn.Conv2d(channels, channels, 3, padding=1))
        self.second = Steps(NamedNorm(channels), nn.SiLU(inplace=True), nn.Sequential(nn.Dropout(0.0)))
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1))
        self.ff = nn.Sequential(Gated(channels), nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x + self.second(self.first(x)))
        tokens = x.flatten(2).transpose(1, 2)
        return tokens + self.ff(tokens)


OPERATORS = {"group_norm_silu": 2, "upsample_conv": 1, "geglu": 1}
X = torch.randn(2, 12, 7, 5, generator=torch.Generator().manual_seed(0))


def made(module: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for parameter in module.requires_grad_(False).parameters():
        parameter.normal_(0.1, 0.3)
    return module.eval()


def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    fastdiff.report(reset=True)
    with torch.no_grad():
        return module(*args, **kwargs)


def ran() -> dict[str, int]:
    return {name: count for (name, _), count in fastdiff.report().calls.items()}


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert torch.linalg.vector_norm(actual - expected) <= 1e-5 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_foreign_block(dtype: torch.dtype, layout: torch.memory_format) -> None:
    module, x = made(ForeignBlock()).to(dtype), X.to(dtype).contiguous(memory_format=layout)
    # Norms in float32 keep their parameters so.
    module.first[0].float()
    # A norm of x.float() has no float64.
    plain, wide = called(module, x), copy.deepcopy(module)
    wide.first[0] = nn.GroupNorm(3, 12)
    wide.first[0].load_state_dict(module.first[0].state_dict())
    truth, keys = called(wide.double(), x.double()), list(module.state_dict())
    given = x.clone()
    fastdiff.accelerate(module, strict=True)
    assert_close_to_truth(called(module, x), truth, plain)
    assert ran() == OPERATORS
    assert torch.equal(x, given)
    assert list(module.state_dict()) == keys
    names = {f"ForeignBlock: {name}" for name in ("Sequential", "Steps", "Gated")}
    assert fastdiff.report().networks.keys() >= names
    fastdiff.restore(module)
    assert torch.equal(called(module, x), plain)
    assert ran() == {}
    assert not fastdiff.report().networks.keys() & names


class NotNorm32(nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.float()).type(x.dtype) * 1.5


class HeirOfNorm32(Norm32):
    def forward(self, x):
        return super().forward(2 * x)


class OtherSwish(nn.Module):
    def forward(self, value):
        return value * th.tanh(value)


class OtherGated(Gated):
    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.silu(gate)


class ScaledSwish(Swish):
    def __call__(self, x):
        return 2 * super().__call__(x)


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(12, 12, **{"kernel_size": 3, "padding": 1, **options})


UNPROVED = {
    "norm that scales": lambda: nn.Sequential(NotNorm32(3, 12), nn.SiLU()),
    "norm of a subclass": lambda: nn.Sequential(HeirOfNorm32(3, 12), nn.SiLU()),
    "another activation": lambda: nn.Sequential(nn.GroupNorm(3, 12), OtherSwish()),
    "a call of its own": lambda: nn.Sequential(nn.GroupNorm(3, 12), ScaledSwish()),
    "another gate": lambda: nn.Sequential(OtherGated(5)),
    "bilinear": lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), conv()),
    "three times": lambda: nn.Sequential(nn.Upsample(scale_factor=3), conv()),
    "one side": lambda: nn.Sequential(nn.Upsample(scale_factor=(2, 1)), conv()),
    "size": lambda: nn.Sequential(nn.Upsample(size=(14, 10)), conv()),
    "5x5": lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv(kernel_size=5, padding=2)),
    "no padding": lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv(padding=0)),
    "stride": lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv(stride=2)),
    "dilated": lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv(dilation=2, padding=2)),
    "groups": lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv(groups=3)),
    "circular": lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv(padding_mode="circular")),
    "normed weight": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.utils.parametrizations.weight_norm(conv())),
    "a Sequential that iterates otherwise": lambda: type(
        "Back", (nn.Sequential,), {"__iter__": lambda self: reversed(list(self._modules.values()))}
    )(nn.GroupNorm(3, 12), nn.SiLU()),
    "multi-head attention": lambda: nn.MultiheadAttention(12, 3),
}


@pytest.mark.parametrize("make", UNPROVED.values(), ids=UNPROVED)
def test_what_cannot_be_proved_is_left(make: Any) -> None:
    module = make()
    with pytest.raises(InputError, match="fastdiff has no network for"):
        fastdiff.accelerate(module, strict=True)
    assert all(forward(inner) is None for inner in module.modules())


UPSAMPLES = {
    "both sides": nn.Upsample(scale_factor=(2, 2)),
    "by its old name": nn.UpsamplingNearest2d(scale_factor=2),
    "exact": nn.Upsample(scale_factor=2, mode="nearest-exact"),
}


@pytest.mark.parametrize("upsample", UPSAMPLES.values(), ids=UPSAMPLES)
def test_other_words_for_doubling(upsample: nn.Module) -> None:
    module = made(nn.Sequential(upsample, conv(padding="same", bias=False)))
    plain = called(module, X)
    truth = called(copy.deepcopy(module).double(), X.double())
    assert_close_to_truth(called(fastdiff.accelerate(module), X), truth, plain)
    assert ran() == {"upsample_conv": 1}
    assert fastdiff.report().networks["Sequential: Sequential"] == 4 * 12 * 12 * 16
    # Three dimensions are doubled too; no operator does that.
    volume = made(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv3d(12, 12, 3, padding=1)))
    with pytest.raises(InputError):
        fastdiff.accelerate(volume, strict=True)


def adapted(module: Any) -> None:
    inner = module.up[1]
    module.up[1] = nn.Sequential(copy.deepcopy(inner), nn.Tanh())


CHANGES = {
    "weight of the convolution": (lambda m: m.up[1].weight.mul_(2), {}),
    "weight of the norm": (lambda m: m.second[0].weight.mul_(2), {}),
    "state dict": (lambda m: m.load_state_dict({k: v + 0.1 for k, v in m.state_dict().items()}), {}),
    "adapter on the convolution": (adapted, {"upsample_conv": 0}),
    "adapter on the projection": (lambda m: setattr(m.ff[0], "proj", nn.Sequential(m.ff[0].proj, nn.Tanh())), {}),
    "hook on the convolution": (
        lambda m: m.up[1].register_forward_hook(lambda module, args, out: 2 * out),
        {"upsample_conv": 0},
    ),
    "hook on the projection": (lambda m: m.ff[0].proj.register_forward_hook(lambda module, args, out: 2 * out), {}),
    "hook on the block": (lambda m: m.second.register_forward_hook(lambda module, args, out: 2 * out), {}),
    "another factor": (lambda m: setattr(m.up[0], "scale_factor", 3.0), {"upsample_conv": 0}),
    "another epsilon": (lambda m: setattr(m.second[0], "eps", 3.0), {}),
    "a forward of the norm": (
        lambda m: setattr(m.second[0], "forward", lambda x: x),
        {"group_norm_silu": 1},
    ),
    "members exchanged": (lambda m: m.second.insert(1, nn.Tanh()), {"group_norm_silu": 1}),
}


@pytest.mark.parametrize(("change", "counts"), CHANGES.values(), ids=CHANGES)
@pytest.mark.filterwarnings("ignore:fastdiff. .* runs as before")
def test_a_change_takes_effect(change: Any, counts: dict[str, int]) -> None:
    module = fastdiff.accelerate(made(ForeignBlock()))
    before = called(module, X)
    with torch.no_grad():
        change(module)
    expected = called(fastdiff.restore(copy.deepcopy(module)), X)
    assert_near(called(module, X), expected)
    assert ran() == {name: n for name, n in (OPERATORS | counts).items() if n}
    assert before.shape != expected.shape or not torch.allclose(before, expected)


def test_what_changes_a_class_takes_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    module = fastdiff.accelerate(made(ForeignBlock()))
    monkeypatch.setattr(Swish, "forward", lambda self, x: x.tanh())
    monkeypatch.setattr(Gated, "forward", lambda self, x: x.tanh())
    expected = called(fastdiff.restore(copy.deepcopy(module)), X)
    assert_near(called(module, X), expected)
    assert ran() == {"group_norm_silu": 1, "upsample_conv": 1}


def test_hooks_of_all_modules_see_every_member() -> None:
    module, seen = fastdiff.accelerate(made(ForeignBlock())), []
    handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: seen.append(type(m).__name__))
    with warnings.catch_warnings(), handle:
        warnings.simplefilter("ignore")
        called(module, X)
    assert {"Norm32", "Swish", "NamedNorm", "SiLU", "Upsample", "Conv2d", "Linear"} <= set(seen)


def test_gradients_transforms_and_empty_inputs_are_pytorchs() -> None:
    module = made(ForeignBlock())
    plain = copy.deepcopy(module)
    fastdiff.accelerate(module)
    assert torch.equal(called(module, X[:0]), called(plain, X[:0]))
    x = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(module(x).square().sum(), x)
    y = X.clone().requires_grad_()
    assert torch.equal(gradient, torch.autograd.grad(plain(y).square().sum(), y)[0])
    batched = X.unflatten(0, (2, 1))
    assert_near(torch.vmap(module)(batched), torch.vmap(plain)(batched))
    tangents = [torch.func.jvp(each, (X,), (X,))[1] for each in (module, plain)]
    assert_near(*tangents)
    assert ran() == {}
    module.train()
    module.up[1].weight.requires_grad_()
    module(X).sum().backward()
    assert module.up[1].weight.grad is not None
    # What comes before has nothing to differentiate.
    assert ran() == {"group_norm_silu": 2}


def test_autocast_is_left_and_said_once() -> None:
    module = fastdiff.accelerate(made(ForeignBlock()))
    with torch.autocast("cpu", dtype=torch.bfloat16), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ours = called(module, X), called(module, X)
        assert ran() == {}
        left = fastdiff.report().left
        theirs = called(fastdiff.restore(copy.deepcopy(module)), X)
    assert torch.equal(ours[0], theirs)
    assert left == {
        (f"ForeignBlock: {name}", "autocast is on"): n for name, n in (("Sequential", 2), ("Steps", 1), ("Gated", 1))
    }
    said = [str(each.message) for each in caught if "fastdiff" in str(each.message)]
    assert sorted(said) == [
        f"fastdiff: ForeignBlock: {name} runs as before: autocast is on" for name in ("Gated", "Sequential", "Steps")
    ]


def test_copies_and_pickles_stand_alone() -> None:
    module = fastdiff.accelerate(made(ForeignBlock()))
    expected = called(module, X)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(called(copied, X), expected)
        assert ran() == OPERATORS
        copied.up[1].weight.mul_(2)
        assert not torch.equal(called(copied, X), expected)
        assert forward(copied.up).owner is copied.up
        fastdiff.restore(copied)
    assert torch.equal(called(module, X), expected)
    assert ran() == OPERATORS


def test_one_module_in_two_places() -> None:
    module = made(ForeignBlock())
    module.again = module.first
    module.inner = nn.Sequential(module.first[0], module.second[1])
    plain = called(module.inner, X)
    fastdiff.accelerate(module)
    assert_near(called(module.inner, X), plain)
    assert ran() == {"group_norm_silu": 1}
    fastdiff.restore(module)
    assert forward(module.first) is None


def test_rewrites_can_be_turned_off_and_on() -> None:
    module = made(ForeignBlock())
    plain = called(module, X)
    fastdiff.accelerate(module, rewrites=[])
    assert torch.equal(called(module, X), plain)
    assert ran() == {}
    fastdiff.accelerate(module, rewrites=["geglu", "upsample_conv"])
    called(module, X)
    assert ran() == {"geglu": 1, "upsample_conv": 1}
    module.up[1].weight.data[:] = 0.5
    fastdiff.accelerate(module)
    expected = called(fastdiff.restore(copy.deepcopy(module)), X)
    assert_near(called(module, X), expected)
    assert ran() == OPERATORS


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_compiled_and_traced_graphs_are_the_modules_own() -> None:
    module = made(ForeignBlock())
    plain = called(module, X)
    fastdiff.accelerate(module)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_near(called(compiled, X), plain)
    assert ran() == {}
    traced = torch.jit.trace(module, X, check_trace=False)
    assert_near(called(traced, X), plain)


def test_members_that_were_wrapped_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """As libraries do that move weights to a device for the time of a call."""
    module = fastdiff.accelerate(made(ForeignBlock()))
    called(module, X)
    norm, seen = module.second[0], []
    own = norm.forward

    @functools.wraps(own)
    def wrapped(*args: Any) -> Tensor:
        seen.append(args)
        return own(*args)

    monkeypatch.setattr(norm, "forward", wrapped)
    with pytest.warns(UserWarning, match="a hook or another forward is on a GroupNorm"):
        called(module, X)
    assert len(seen) == 1
