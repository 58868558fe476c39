"""A Gaussian mixture on the line, for which diffusion is solved exactly.

At x = alpha x_0 + sigma epsilon the marginal is again a mixture, with means alpha mu and variances alpha^2 s^2 +
sigma^2. The best denoiser is a ratio of sums, and the probability-flow ODE, being monotone in one dimension, carries
each quantile of the marginal at one level to the same quantile at the next: x' = F'^-1(F(x)).
"""

from dataclasses import dataclass

import numpy as np
import torch

from fastdiff.parameterization import target
from fastdiff.schedules import Schedule


@dataclass(frozen=True)
class Mixture:
    weights: tuple[float, ...] = (0.3, 0.5, 0.2)
    means: tuple[float, ...] = (-1.2, 0.1, 1.0)
    stds: tuple[float, ...] = (0.35, 0.25, 0.45)

    def _at(self, alpha: float, sigma: float):
        return alpha * np.array(self.means), np.sqrt((alpha * np.array(self.stds)) ** 2 + sigma**2)

    def denoise(self, x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        """E[x_0 | x]."""
        means, stds = self._at(alpha, sigma)
        z = (x[..., None] - means) / stds
        log_weight = np.log(self.weights) - np.log(stds) - 0.5 * z**2
        weight = np.exp(log_weight - log_weight.max(axis=-1, keepdims=True))
        weight /= weight.sum(axis=-1, keepdims=True)
        return (weight * (np.array(self.means) + alpha * np.array(self.stds) ** 2 / stds * z)).sum(axis=-1)

    def denoiser(self, schedule: Schedule, prediction: str):
        """The exact network (x, t) -> m on this schedule."""

        def network(x: np.ndarray, t: float) -> np.ndarray:
            alpha, sigma = (float(value) for value in schedule.at(t))
            clean = self.denoise(x, alpha, sigma)
            c0, c1 = target(prediction, alpha, sigma)
            return c0 * clean + c1 * (x - alpha * clean) / sigma

        return network

    def cdf(self, x: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        means, stds = self._at(alpha, sigma)
        z = torch.from_numpy((x[..., None] - means) / stds)
        return (np.array(self.weights) * torch.special.ndtr(z).numpy()).sum(axis=-1)

    def quantile(self, p: np.ndarray, alpha: float, sigma: float) -> np.ndarray:
        """By bisection down to the last bit or so."""
        reach = 10.0 * (1.0 + sigma)
        low, high = np.full_like(p, -reach), np.full_like(p, reach)
        for _ in range(80):
            middle = 0.5 * (low + high)
            below = self.cdf(middle, alpha, sigma) < p
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return 0.5 * (low + high)

    def sample(self, generator: np.random.Generator, count: int, alpha: float = 1.0, sigma: float = 0.0) -> np.ndarray:
        which = generator.choice(len(self.weights), size=count, p=self.weights)
        means, stds = self._at(alpha, sigma)
        return means[which] + stds[which] * generator.standard_normal(count)

    def moments(self) -> tuple[float, float]:
        """Mean and variance."""
        w, mu, s = (np.array(values) for values in (self.weights, self.means, self.stds))
        mean = float((w * mu).sum())
        return mean, float((w * (s**2 + mu**2)).sum() - mean**2)
