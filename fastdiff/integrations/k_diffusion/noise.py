"""The noise of k-diffusion's samplers: new at each call, or the increments of a Brownian path over sigma."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.integrations.k_diffusion.loop import Draw, Plan

NoiseSampler = Callable[[Tensor, Tensor], Tensor]


def normal_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Standard normal noise from PyTorch's own generator, laid out as x is: so the same number goes to each element."""
    if x.is_cpu and x.is_contiguous():
        return ops.torch_normal(x.shape, dtype=dtype or x.dtype)
    return torch.randn_like(x, dtype=dtype)


def default_noise_sampler(x):
    """(sigma, sigma_next) -> standard normal noise like x, from PyTorch's own generator."""
    return lambda sigma, sigma_next: normal_like(x)


class BatchedBrownianTree:
    """(t0, t1) -> W(t1) - W(t0) of a Brownian path like x between t0 and t1, by torchsde's BrownianTree.

    seed      one number: of one path over the whole batch; None: one from PyTorch's own generator. A sequence: of one
              path for each sample.
    kwargs    of torchsde.BrownianTree; w0 the value at the start, 0 unless given
    Errors: InputError without torchsde, or with a sequence of another length than x.
    """

    def __init__(self, x, t0, t1, seed=None, **kwargs):
        start, end, self.sign = self.sort(t0, t1)
        w0 = kwargs.pop("w0", None)
        w0 = torch.zeros_like(x) if w0 is None else w0
        if seed is None:
            seed = torch.randint(0, 2**63 - 1, []).item()
        self.batched = hasattr(seed, "__len__")
        if self.batched and len(seed) != x.shape[0]:
            raise InputError(f"seed: expected a number or one for each of {x.shape[0]} samples, got {len(seed)}")
        seeds, w0 = (seed, w0[0]) if self.batched else ([seed], w0)
        tree = _brownian_tree()
        self.trees = [tree(start, w0, end, entropy=one, **kwargs) for one in seeds]

    @staticmethod
    def sort(a, b):
        """(the smaller, the larger, 1 if they came in that order else -1)."""
        return (a, b, 1) if a < b else (b, a, -1)

    def __call__(self, t0, t1):
        start, end, sign = self.sort(t0, t1)
        increments = torch.stack([tree(start, end) for tree in self.trees]) * (self.sign * sign)
        return increments if self.batched else increments[0]


class BrownianTreeNoiseSampler:
    """(sigma, sigma_next) -> (W(t1) - W(t0)) / sqrt(|t1 - t0|), t = transform(sigma): standard normal noise of which
    the same path gives the same whatever the steps.

    sigma_min, sigma_max   the ends of the path
    seed                   that of `BatchedBrownianTree`
    Errors: InputError without torchsde.
    """

    def __init__(self, x, sigma_min, sigma_max, seed=None, transform=lambda x: x):
        self.transform = transform
        t0, t1 = self.transform(torch.as_tensor(sigma_min)), self.transform(torch.as_tensor(sigma_max))
        self.tree = BatchedBrownianTree(x, t0, t1, seed)

    def __call__(self, sigma, sigma_next):
        t0, t1 = self.transform(torch.as_tensor(sigma)), self.transform(torch.as_tensor(sigma_next))
        return self.tree(t0, t1) / (t1 - t0).abs().sqrt()


def _brownian_tree() -> Any:
    try:
        from torchsde import BrownianTree
    except ImportError as error:
        raise InputError(
            "noise_sampler: a Brownian path needs torchsde; pip install 'fastdiff-engine[brownian]', or pass a "
            "noise_sampler such as default_noise_sampler(x)"
        ) from error
    return BrownianTree


def noise_or_default(noise_sampler: NoiseSampler | None, x: Tensor) -> NoiseSampler:
    """The caller's, or new noise at each call."""
    return default_noise_sampler(x) if noise_sampler is None else noise_sampler


def brownian(x: Tensor, levels: Sequence[float], dtype: torch.dtype) -> NoiseSampler:
    """A path over the run's levels, which are rounded to `dtype`; its sigmas lie on the host and are not waited for."""
    ends = torch.tensor([min(level for level in levels if level > 0.0), max(levels)], dtype=dtype)
    return BrownianTreeNoiseSampler(x, ends[0], ends[1])


def at_the_end(plan: Plan, noise: NoiseSampler, sigmas: Tensor, levels: Sequence[float]) -> Draw:
    """Noise in the last row of each step but one to 0."""

    def draw(step: int, call: int, dtype: torch.dtype) -> Tensor | None:
        if call + 1 < plan.counts[step] or levels[step + 1] == 0.0:
            return None
        return noise(sigmas[step], sigmas[step + 1])

    return draw
