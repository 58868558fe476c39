"""The increments of torchsde's Brownian paths, by a sum over the nodes of its tree in place of a walk down it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.errors import InputError

__all__ = ["BrownianPath", "BrownianTreeNoiseSampler"]

_DIGITS = 6
_POOL = 24


class _Node(NamedTuple):
    """An interval that the tree halves; key and depth name its seed."""

    start: float
    end: float
    key: int
    depth: int

    @property
    def middle(self) -> float:
        return round(0.5 * (self.end + self.start), _DIGITS)

    def tent(self, time: float) -> float:
        """What the node's noise adds to the path at a time: nothing at its ends, and in its middle m a deviation of
        sqrt((m - s) (e - m) / (e - s)), that of a path whose ends are known."""
        start, end, middle = self.start, self.end, self.middle
        if not start < time < end:
            return 0.0
        height = math.sqrt((middle - start) * (end - middle) / (end - start))
        return height * ((time - start) / (middle - start) if time <= middle else (end - time) / (end - middle))


class BrownianPath:
    """(a, b) -> W(b) - W(a) = (b - a) / (t1 - t0) W(t1) + the sum over nodes k of (h_k(b) - h_k(a)) X_k

    with X_k standard normal noise of the node's own seed and h_k its tent, Levy's construction. The tree halves
    [t0, t1] until the times that are asked for, rounded to six digits, are ends of its intervals; only nodes that have
    one of them inside count. Seeds, roundings and so the path are those of `torchsde.BrownianInterval(t0, t1, size,
    dtype, device, entropy=seed, tol=1e-6, pool_size=24, halfway_tree=True)` up to rounding: that computes increments
    of all intervals down to the ones that are asked for.

    like    of the shape, dtype and device of W; the sum is float32 or better
    Source: Levy, "Processus stochastiques et mouvement brownien", 1948; Li et al., "Scalable Gradients for Stochastic
    Differential Equations", 2020, section 4 (the tree).
    """

    def __init__(self, like: Tensor, t0: float, t1: float, seed: int) -> None:
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device
        self._seed, self._scale = seed, math.sqrt(t1 - t0)
        self._ends = t0, t1
        self._root = _Node(round(t0, _DIGITS), round(t1, _DIGITS), 0, 0)
        self._seeds: dict[tuple[int, ...], int] = {}

    def __call__(self, a: float, b: float, factor: float = 1.0) -> Tensor:
        """The increment times a factor."""
        low, high = self._ends
        a, b = (round(min(max(time, low), high), _DIGITS) for time in (a, b))
        root = self._root
        weights: dict[tuple[int, ...], float] = {(): factor * (b - a) / (root.end - root.start) * self._scale}
        for node in {*self._nodes(a), *self._nodes(b)}:
            weights[node.key, node.depth] = factor * (node.tent(b) - node.tent(a))
        generator = torch.Generator(self.device)
        total = torch.zeros(self.shape, dtype=torch.promote_types(self.dtype, torch.float32), device=self.device)
        for name in sorted(weights):
            if weights[name] != 0.0:
                total.add_(self._noise(name, generator), alpha=weights[name])
        return total.to(self.dtype)

    def _nodes(self, time: float) -> Iterator[_Node]:
        """Those that have the time inside, from the root to where it is an end."""
        node = self._root
        while node.start < time < node.end:
            yield node
            start, end, key, depth = node
            middle = node.middle
            if time <= middle:
                node = _Node(start, middle, 2 * key, depth + 1)
            else:
                node = _Node(middle, end, 2 * key + 1, depth + 1)

    def _noise(self, name: tuple[int, ...], generator: torch.Generator) -> Tensor:
        seed = self._seeds.get(name)
        if seed is None:
            words = np.random.SeedSequence(entropy=self._seed, spawn_key=name, pool_size=_POOL).generate_state(1)
            seed = self._seeds[name] = int(words[0])
        return ops.torch_normal(self.shape, generator=generator.manual_seed(seed), device=self.device, dtype=self.dtype)


class BrownianTreeNoiseSampler:
    """(sigma, sigma_next) -> (W(sigma_next) - W(sigma)) / sqrt(|sigma_next - sigma|), the same whatever the steps.

    seed   one number: of one path over the whole batch; None: one from PyTorch's own generator. A sequence: of one path
           for each sample.
    """

    def __init__(self, x: Tensor, sigma_min: float, sigma_max: float, seed: int | Sequence[int] | None = None) -> None:
        low, high = (float(np.float32(sigma)) for sigma in (sigma_min, sigma_max))
        if seed is None:
            seed = int(torch.randint(0, 2**63 - 1, []).item())
        self.batched = isinstance(seed, Sequence)
        if isinstance(seed, Sequence):
            if len(seed) != len(x):
                raise InputError(f"seed: expected a number or one for each of {len(x)} samples, got {len(seed)}")
            self.paths = [BrownianPath(x[0], low, high, one) for one in seed]
        else:
            self.paths = [BrownianPath(x, low, high, seed)]

    def __call__(self, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
        start, end = (float(np.float32(float(time))) for time in (sigma, sigma_next))
        factor = 1.0 / math.sqrt(abs(end - start)) if start != end else math.nan
        if end < start:
            start, end, factor = end, start, -factor
        increments = [path(start, end, factor) for path in self.paths]
        return torch.stack(increments) if self.batched else increments[0]
