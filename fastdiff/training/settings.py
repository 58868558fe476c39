"""What decides a training run: two runs with equal settings and data give equal weights."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch

from fastdiff import schedules
from fastdiff.errors import InputError
from fastdiff.training.losses import Objective

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run's settings; a resumed run must have the same, but for steps.

    parts          each batch is computed in this many parts, side by side on the CPU: one slow core then does not hold
                   up every layer of the other
    steps          optimizer steps of the whole run; the learning rate falls to 0 at the last
    snr_cap        c of `Objective`, or None
    label_dropout  probability that an image's label is replaced by "no label", for classifier-free guidance
    ema            final decay of the averaged weights, which are the result
    holdout        images kept out of training, on which the validation loss is measured; 0 for none
    patience       evaluations without a better validation loss before the run ends early; 0 for never
    dtype          "bfloat16" runs the network under autocast; the weights are float32 either way

    Errors: InputError for a value out of range.
    """

    steps: int
    batch: int = 64
    parts: int = 1
    lr: float = 1e-3
    warmup: int = 500
    weight_decay: float = 0.01
    beta2: float = 0.99
    clip: float = 1.0
    ema: float = 0.999
    prediction: str = "v"
    schedule: str = "cosine"
    schedule_steps: int = 1000
    snr_cap: float | None = None
    label_dropout: float = 0.1
    flip: bool = False
    holdout: int = 1000
    evaluate_every: int = 500
    patience: int = 0
    seed: int = 0
    dtype: str = "bfloat16"
    channels: tuple[int, ...] = (32, 64, 96)
    layers: int = 1
    attention: tuple[int, ...] = (7, 8)
    head_dim: int = 32
    groups: int = 8

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "parts", "evaluate_every", "schedule_steps", "layers", "head_dim", "groups"):
            _require(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("warmup", "holdout", "patience"):
            _require(name, getattr(self, name), getattr(self, name) >= 0, "0 or more")
        for name in ("lr", "clip"):
            _require(name, getattr(self, name), 0 < getattr(self, name) < math.inf, "a positive number")
        _require("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "0 or more")
        for name in ("ema", "beta2"):
            _require(name, getattr(self, name), 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        _require("label_dropout", self.label_dropout, 0 <= self.label_dropout <= 1, "from 0 to 1")
        _require("batch", self.batch, self.batch < 2**20, "below 2^20")
        _require("batch", self.batch, self.batch % self.parts == 0, f"a multiple of parts={self.parts}")
        _require("steps", self.steps, self.steps < 2**31, "below 2^31")
        _require("seed", self.seed, 0 <= self.seed < 2**40, "from 0 to 2^40 - 1")
        _require("channels", self.channels, bool(self.channels) and min(self.channels) >= 1, "positive numbers")
        if self.dtype not in DTYPES:
            raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.patience and not self.holdout:
            raise InputError("patience: expected a held-out split to watch, got holdout=0; hold some images out")
        for channels in self.channels:
            if channels % self.groups:
                raise InputError(f"channels: {channels} is not divisible by groups={self.groups}")
        self.objective()

    def objective(self) -> Objective:
        name = "flow" if self.prediction == "flow" else self.schedule
        schedule = schedules.from_config({"name": name, "steps": self.schedule_steps})
        return Objective(self.prediction, schedule, self.snr_cap)

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON holds them (tuples become lists)."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    def network_config(self, sample_shape: tuple[int, int, int], num_classes: int | None) -> dict[str, Any]:
        """UNet2DModel's configuration; where labels are dropped, one more class row stands for none.

        Errors: InputError where the image size cannot be halved once per level, or head_dim does not fit.
        """
        channels, size, _ = sample_shape
        levels = len(self.channels)
        if size % 2 ** (levels - 1):
            raise InputError(
                f"size: {size} cannot be halved {levels - 1} times; pass --size with a multiple of {2 ** (levels - 1)}"
            )
        attends = [size // 2**level in self.attention for level in range(levels)]
        # The blocks between the way down and the way up attend as soon as any level may.
        for width in {c for c, a in zip(self.channels, attends, strict=True) if a} | set(
            self.channels[-1:] * bool(self.attention)
        ):
            _require(
                "head_dim", self.head_dim, width % self.head_dim == 0, f"a divisor of the {width} channels that attend"
            )
        return {
            "sample_size": size,
            "in_channels": channels,
            "out_channels": channels,
            "block_out_channels": list(self.channels),
            "layers_per_block": self.layers,
            "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            "add_attention": bool(self.attention),
            "attention_head_dim": self.head_dim,
            "norm_num_groups": self.groups,
            "num_class_embeds": None if num_classes is None else num_classes + (self.label_dropout > 0),
        }


def _require(name: str, value: Any, holds: bool, expected: str) -> None:
    if not holds:
        raise InputError(f"{name}: expected {expected}, got {value}")
