"""What modules of any network have in common that run on fastdiff's operators over their own layers."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from fastdiff import ops
from fastdiff.models.caches import Cache
from fastdiff.models.calls import Left, note
from fastdiff.models.forward import Forward
from fastdiff.models.leaf import is_plain
from fastdiff.models.rewrites import Rewrites
from fastdiff.ops import networks

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


class Parts:
    """The modules of one class inside a network: what the report says of them together."""

    def __init__(self, name: str, rewrites: Rewrites) -> None:
        self.name, self.rewrites = name, rewrites
        self._forwards: weakref.WeakSet[Fused] = weakref.WeakSet()
        self._warned: set[str] = set()

    def add(self, forward: Fused) -> None:
        self._forwards.add(forward)
        networks.watch(self)

    def remove(self, forward: Fused) -> None:
        self._forwards.discard(forward)
        if not self._forwards:
            networks.forget(self)

    def copies(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for each in list(self._forwards) for tensor in each.kept.values())

    def leave(self, reason: str | None) -> None:
        """Notes a call that was the modules' own, and warns of each reason once."""
        note(self.name, reason, self._warned, depth=6)

    def __deepcopy__(self, memo: dict[int, Any]) -> Parts:
        memo[id(self)] = made = Parts(self.name, self.rewrites)
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return Parts, (self.name, self.rewrites)


class Fused(Forward):
    """A forward whose `fused` gives what the class's own does, or raises Left before it has computed anything."""

    def __init__(self, owner: nn.Module, parts: Parts) -> None:
        super().__init__(owner)
        self.parts = parts
        self.kept = Cache(1)
        """What was computed from the owner's parameters."""

    def install(self) -> None:
        super().install()
        self.parts.add(self)

    def undo(self) -> None:
        self.parts.remove(self)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self.check_class()
            return self.fused(*args, **kwargs)
        except Left as left:
            reason = left.reason
        result = self.original(*args, **kwargs)
        # Of what the library has refused it has told itself.
        self.parts.leave(reason)
        return result

    def check_class(self) -> None:
        """Raises Left where the owner's class has another forward than the one that was proved."""

    def fused(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def copied(self, owner: nn.Module, memo: dict[int, Any]) -> Any:
        made = type(self)(owner, copy.deepcopy(self.parts, memo))
        made.parts.add(made)
        return made

    def arguments(self) -> tuple[Any, ...]:
        return (self.parts,)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        super().__setstate__(state)
        self.parts.add(self)


def is_foldable(conv: Any) -> bool:
    """Whether a layer is a 3x3 convolution that can be taken together with a doubling of its input."""
    return (
        isinstance(conv, nn.Conv2d)
        and is_plain(conv)
        and conv.kernel_size == (3, 3)
        and conv.padding in ((1, 1), "same")
        and conv.stride == conv.dilation == (1, 1)
        and conv.groups == 1
    )


def unfit(x: Any, parameters: Iterable[Tensor | None]) -> str | None:
    """Why nothing of ours takes x now; "" for what everybody expects. `parameters`: those that the result reads."""
    if type(x) is not Tensor or not (x.is_cpu or x.is_cuda):
        return ""
    if torch.is_grad_enabled() and (x.requires_grad or any(p is not None and p.requires_grad for p in parameters)):
        return ""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return ""
    if x.dtype not in FLOATS or x.numel() == 0:
        return f"its input is {x.dtype}" if x.numel() else "its input is empty"
    return "autocast is on" if torch.is_autocast_enabled(x.device.type) else None


def norm_obstacle(norm: Any, x: Any) -> str | None:
    """Why `normed` does not take x, as `unfit` says it."""
    weight, bias = norm.weight, norm.bias
    reason = unfit(x, (weight, bias))
    if reason is not None:
        return reason
    # The norm of x.float() has its parameters in float32.
    dtype = x.dtype if type(norm).forward is nn.GroupNorm.forward else torch.float32
    fits = x.dim() > 1 and x.shape[1] == norm.num_channels and not isinstance(norm.eps, Tensor)
    for value in (weight, bias):
        fits = fits and (value is None or (value.dtype == dtype and value.device == x.device))
    # PyTorch refuses to normalise a single value.
    return None if fits and x.numel() // norm.num_groups > 1 else "a GroupNorm does not fit its input"


def normed(norm: Any, x: Tensor, *, silu: bool = True, addend: Tensor | None = None) -> Tensor:
    """silu(norm(x + addend[n, c])) or norm(x + addend[n, c])."""
    y: Tensor = ops.group_norm_silu(x, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, silu=silu, addend=addend)
    return y


def doubling_obstacle(conv: Any, x: Any) -> str | None:
    """Why `convolve_doubled` does not take x, as `unfit` says it."""
    reason = unfit(x, (conv.weight, conv.bias))
    if reason is not None:
        return reason
    fits = x.dim() == 4 and x.shape[1] == conv.in_channels and x.dtype == conv.weight.dtype
    return None if fits and x.device == conv.weight.device else "a convolution does not fit its input"


def convolve_doubled(conv: Any, x: Tensor, kept: Cache, *, bias: bool = True) -> Tensor:
    """conv(nearest2x(x)); kept: where the weight that does both stays."""
    weight = kept.get(None, [conv.weight], lambda: ops.fold_upsample(conv.weight))
    return ops.upsample_conv(x, weight, conv.bias if bias else None)


def convolved_onto(x: Tensor, conv: Any, h: Tensor) -> Tensor:
    """x + conv(h), added where the convolution writes its result if it is one that `is_foldable`."""
    fits = is_foldable(conv) and doubling_obstacle(conv, h) is None and type(x) is Tensor and x.dtype == h.dtype
    if fits and x.shape == (len(h), conv.out_channels, *h.shape[2:]):
        return ops.conv_bias_residual(h, conv.weight, conv.bias, x, padding=1)
    return x + conv(h)


def leave(reason: str | None) -> None:
    """Leaves a call to the module's own forward where there is a reason, which may be ""."""
    if reason is not None:
        raise Left(reason or None)
