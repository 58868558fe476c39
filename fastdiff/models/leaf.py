"""The layers with weights, which other code may put layers of its own in the place of."""

from __future__ import annotations

from torch import nn

_PLAIN = (nn.Linear, nn.Conv2d)


def is_plain(leaf: nn.Module) -> bool:
    """Whether calling this layer is its product with `weight` plus `bias` and nothing else: no adapter around it, no
    hook on it, no weight that is computed."""
    return type(leaf) in _PLAIN and not (leaf._forward_hooks or leaf._forward_pre_hooks or "forward" in leaf.__dict__)
