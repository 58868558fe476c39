"""What every block of a network reads in one forward pass besides its feature map."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fastdiff.models.prepacked import Packs
from fastdiff.models.rewrites import Rewrites


@dataclass
class Context:
    """time (N, channels), the embedding of the timestep, activated already; tokens (B, S, channels).

    packs              the weights as the CPU's products read them, where this call may use them
    projected          the time as each residual block takes it, where that was made beforehand
    mask, token_mask   (B, 1, 1, keys), added to the scores of the pixels and of the tokens
    """

    rewrites: Rewrites = field(default_factory=Rewrites)
    packs: Packs | None = None
    time: Tensor | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    token_mask: Tensor | None = None
    projected: Mapping[nn.Module, Tensor] | None = None
