"""What is drawn at random: a network of diffusers with a call, and the dice."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

ACTIVATIONS = ("silu", "silu", "silu", "swish", "gelu", "mish", "relu")
TEXT = 12
"""Channels of the text."""

Config = dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """A network's class and configuration, and what it is called with."""

    kind: type[nn.Module]
    config: Config
    arguments: Config
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        """float64, but where the library's code runs in float32 alone."""
        late = self.kind is not UNet2DConditionModel and self.config.get("class_embed_type") == "timestep"
        return torch.float32 if late else torch.float64

    def network(self) -> Any:
        """The network in that dtype, every parameter random."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            made = self.kind(**self.config).eval().requires_grad_(False).to(self.dtype)
            for name, parameter in made.named_parameters():
                if parameter.dim() <= 1:
                    parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
                elif not parameter.any():
                    parameter.normal_(0.0, parameter[0].numel() ** -0.5)
        return made


class Dice(random.Random):
    """Draws of the things that configurations are made of."""

    def one(self, *values: Any) -> Any:
        return self.choice(values)

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def per_stage(self, stages: int, *values: Any) -> Any:
        """One value for all stages, or one for each."""
        return [self.choice(values) for _ in range(stages)] if self.chance(0.4) else self.choice(values)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(31))
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    def mask(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(31))
        return (torch.rand(shape, generator=generator) < 0.7).to(self.one(torch.int64, torch.bool, torch.float64))

    def sides(self) -> tuple[int, int]:
        return self.randint(5, 11), self.randint(5, 11)

    def memory(self, sample: Tensor) -> Tensor:
        """The same values, laid out in one of the ways in which callers lay them out."""
        how = self.one("contiguous", "contiguous", "channels last", "a part", "transposed")
        if how == "channels last":
            return sample.contiguous(memory_format=torch.channels_last)
        if how == "a part":
            return torch.cat([sample, sample], dim=1)[:, : sample.shape[1]]
        if how == "transposed":
            return sample.transpose(2, 3).contiguous().transpose(2, 3)
        return sample

    def time(self, samples: int, *, whole: bool) -> Any:
        """A time in one of the forms in which it is given."""
        number = self.randint(1, 900)
        forms: list[Any] = [
            number,
            torch.tensor(number),
            torch.tensor([number]),
            torch.tensor([self.randint(1, 900) for _ in range(samples)]),
            torch.tensor([900, number, 3])[1],
        ]
        if not whole:
            forms += [number + 0.25, torch.tensor(number + 0.5), torch.full((samples,), number + 0.5).double()]
        return self.choice(forms)
