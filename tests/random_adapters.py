"""Adapters of PEFT drawn at random: which layers they change, how, and how much."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from random_draws import Dice
from torch import nn


@dataclass(frozen=True)
class Adapters:
    """share: of the layers that each adapter changes. options: each adapter's, by its name. scales: how much of it."""

    share: float
    options: dict[str, dict[str, Any]]
    scales: dict[str, float]
    seed: int

    def put_into(self, network: nn.Module) -> None:
        """The same into every network with the same layers."""
        dice = Dice(self.seed)
        layers = [name for name, module in network.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
        for name, options in self.options.items():
            chosen = [layer for layer in layers if dice.chance(self.share)] or layers[:1]
            with torch.random.fork_rng():
                torch.manual_seed(self.seed)
                config = LoraConfig(target_modules=chosen, init_lora_weights=False, **options)
                inject_adapter_in_model(config, network, name)
        for layer in network.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.set_adapter(list(self.options))
                for name, scale in self.scales.items():
                    layer.set_scale(name, scale)


def draw_adapters(dice: Dice) -> Adapters:
    """One or two, of low rank or with magnitudes of their own (DoRA)."""
    names = ["one", "two"][: dice.randint(1, 2)]
    options = {
        name: {
            "r": dice.randint(1, 3),
            "lora_alpha": dice.randint(1, 4),
            "use_dora": dice.chance(0.4),
            "use_rslora": dice.chance(0.3),
        }
        for name in names
    }
    scales = {name: dice.one(1.0, 0.5, 1.3) for name in names}
    return Adapters(dice.one(0.1, 0.4, 1.0), options, scales, dice.getrandbits(31))
