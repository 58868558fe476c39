"""What every block of a network reads in one forward pass besides its feature map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fastdiff.models.packs import Packs
from fastdiff.models.rewrites import Rewrites


class Time:
    """The embedding of the time (N, channels), and that embedding activated, which is made once for all blocks."""

    def __init__(self, embedding: Tensor, activation: Callable[[Tensor], Tensor]) -> None:
        self.embedding, self._activation = embedding, activation
        self._activated: Tensor | None = None

    @property
    def activated(self) -> Tensor:
        if self._activated is None:
            self._activated = self._activation(self.embedding)
        return self._activated


@dataclass
class Context:
    """time, the embedding of the timestep; tokens (B, S, channels).

    packs              the weights as the CPU's products read them, where this call may use them
    projected          the time as each block takes it, where that was made beforehand
    mask, token_mask   (B, 1, 1 or queries, keys), added to the scores of the pixels and of the tokens
    objects            (B, objects, channels), what GLIGEN's layers look at
    picture            (B, 3, H, W), what NCSN++'s stages carry beside the feature map
    """

    rewrites: Rewrites = field(default_factory=Rewrites)
    packs: Packs | None = None
    time: Time | None = None
    tokens: Tensor | None = None
    mask: Tensor | None = None
    token_mask: Tensor | None = None
    projected: Mapping[nn.Module, Tensor] | None = None
    objects: Tensor | None = None
    picture: Tensor | None = None
