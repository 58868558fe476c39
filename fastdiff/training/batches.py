"""The batches of a run: every random choice is a function of (seed, step), so that a resumed run repeats none.

Steps count from 1; step 0 is the fixed noise and times of the validation loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.noise import STREAM_TRAIN
from fastdiff.training.data import ImageSet

_ORDER, _CHOICES = 1, 2


@dataclass(frozen=True, eq=False)
class Batch:
    """x0 float32 (N, C, H, W) in [-1, 1]; noise like it; k int64 (N,) timestep indices; labels int64 (N,) or None."""

    x0: Tensor
    noise: Tensor
    k: Tensor
    labels: Tensor | None

    def to(self, device: torch.device) -> Batch:
        labels = None if self.labels is None else self.labels.to(device)
        return Batch(self.x0.to(device), self.noise.to(device), self.k.to(device), labels)

    def split(self, parts: int) -> list[Batch]:
        """Equal parts; sample n goes to part n mod `parts`, so that each part spans all times."""
        return [
            Batch(
                self.x0[i::parts],
                self.noise[i::parts],
                self.k[i::parts],
                None if self.labels is None else self.labels[i::parts],
            )
            for i in range(parts)
        ]


def generator(seed: int, stream: int, step: int) -> np.random.Generator:
    """A counter-based generator of its own for each (seed, stream, step)."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, step]))


class BatchStream:
    """Batch of each step: a new order every epoch, times spread evenly, labels dropped, images flipped, noise drawn.

    k = floor(T (u + n/N mod 1)) for sample n of N with one u a step: each batch covers all noise levels (Kingma et al.
    2021, appendix I.1).
    """

    def __init__(
        self, data: ImageSet, *, batch: int, timesteps: int, seed: int, label_dropout: float = 0.0, flip: bool = False
    ) -> None:
        self.data, self.batch, self.timesteps, self.seed = data, batch, timesteps, seed
        self.label_dropout, self.flip = label_dropout, flip
        self._order: tuple[int, np.ndarray] | None = None

    def indices(self, step: int) -> Tensor:
        """Which images step `step` sees: the epochs' orders laid end to end, cut into batches."""
        positions = np.arange((step - 1) * self.batch, step * self.batch)
        epochs, places = np.divmod(positions, len(self.data))
        chosen = np.empty(self.batch, np.int64)
        for epoch in np.unique(epochs):
            chosen[epochs == epoch] = self._epoch_order(int(epoch))[places[epochs == epoch]]
        return torch.from_numpy(chosen)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, generator(self.seed, _ORDER, epoch).permutation(len(self.data)))
        return self._order[1]

    def at(self, step: int) -> Batch:
        choices = generator(self.seed, _CHOICES, step)
        u = (choices.random() + np.arange(self.batch) / self.batch) % 1.0
        dropped = torch.from_numpy(choices.random(self.batch) < self.label_dropout)
        flipped = torch.from_numpy(choices.random(self.batch) < 0.5)
        chosen = self.data.subset(self.indices(step))
        x0 = scaled(chosen.images)
        if self.flip:
            x0 = torch.where(flipped[:, None, None, None], x0.flip(-1), x0)
        labels = chosen.labels
        if labels is not None:
            assert self.data.num_classes is not None  # as there are labels
            labels = labels.masked_fill(dropped, self.data.num_classes)
        k = torch.from_numpy((u * self.timesteps).astype(np.int64)).clamp_(max=self.timesteps - 1)
        return Batch(x0, training_noise(self.seed, x0.shape, step=step), k, labels)


def scaled(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def training_noise(seed: int, shape: torch.Size, *, step: int, first: int = 0) -> Tensor:
    """Noise (N, ...) of samples first..first+N-1 of step `step`, float32 on the CPU."""
    seeds = seed * 2**20 + torch.arange(first, first + shape[0])
    return ops.philox_normal(seeds, tuple(shape), step=step, stream=STREAM_TRAIN)


def validation_batches(data: ImageSet, *, batch: int, timesteps: int, seed: int) -> list[Batch]:
    """The held-out images in order with fixed noise and timesteps spread evenly over the schedule, all labels kept."""
    # Neighbouring images get timesteps that lie far apart, so that each batch sees the whole schedule.
    order = generator(seed, _CHOICES, 0).permutation(len(data))
    k = torch.from_numpy(((order + 0.5) / len(data) * timesteps).astype(np.int64))
    batches = []
    for first in range(0, len(data), batch):
        part = data.subset(torch.arange(first, min(first + batch, len(data))))
        x0 = scaled(part.images)
        noise = training_noise(seed, x0.shape, step=0, first=first)
        batches.append(Batch(x0, noise, k[first : first + len(part)], part.labels))
    return batches
