"""What the network is trained to predict, and how much each noise level counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.schedules import Schedule

PREDICTIONS = ("epsilon", "v", "flow")


@dataclass(frozen=True, eq=False)
class Objective:
    """loss_n = w(k_n) * mean (output_n - target_n)^2 with x_t = alpha x_0 + sigma noise at timestep index k.

    target    epsilon: noise; v: alpha noise - sigma x_0; flow: noise - x_0
    w         1, or with snr_cap = c: min(snr, c) * (d x_0 / d output)^2, snr = alpha^2 / sigma^2, so that every
              prediction has the weight min(snr, c) on its error in x_0

    Errors: InputError for an unknown prediction, a prediction that does not fit the schedule, snr_cap <= 0.
    Source: Ho et al. 2020; Salimans and Ho 2022 (v); Lipman et al. 2023 (flow); Hang et al. 2023, section 3.4 (cap).
    """

    prediction: str
    schedule: Schedule
    snr_cap: float | None = None

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise InputError(f"prediction: expected one of {', '.join(PREDICTIONS)}, got {self.prediction!r}")
        if (self.prediction == "flow") != (self.schedule.kind == "flow"):
            raise InputError(
                f"prediction {self.prediction!r}: does not fit the schedule {self.schedule.name!r}; "
                "the flow prediction goes with the flow schedule, epsilon and v with the others"
            )
        if self.snr_cap is not None and not self.snr_cap > 0:
            raise InputError(f"snr cap: expected a positive number, got {self.snr_cap}")

    def coefficients(self, k: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha, sigma) of timestep indices k (N,), float32 on k's device."""
        table = np.stack([self.schedule.alphas, self.schedule.sigmas])
        alpha, sigma = torch.from_numpy(table).to(torch.float32).to(k.device)[:, k]
        return alpha, sigma

    def timesteps(self, k: Tensor) -> Tensor:
        """What the network is called with at timestep indices k, float32 (N,)."""
        return torch.tensor(self.schedule.timesteps, dtype=torch.float32, device=k.device)[k]

    def noised(self, x0: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        alpha, sigma = self.coefficients(k)
        return ops.add_noise(x0, alpha, sigma, noise=noise)

    def target(self, x0: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - x0
        alpha, sigma = (c.reshape(-1, *(1,) * (x0.dim() - 1)) for c in self.coefficients(k))
        return alpha * noise - sigma * x0

    def weights(self, k: Tensor) -> Tensor:
        """w (N,), float32."""
        if self.snr_cap is None:
            return torch.ones(k.shape, device=k.device)
        alpha, sigma = (c.double() for c in self.coefficients(k))
        snr = (alpha / sigma) ** 2
        if self.prediction == "epsilon":
            # min(snr, c) / snr, written so that alpha may be 0.
            return torch.clamp(self.snr_cap / snr, max=1.0).float()
        return (torch.clamp(snr, max=self.snr_cap) * sigma**2).float()

    def per_sample(self, output: Tensor, x0: Tensor, noise: Tensor, k: Tensor) -> Tensor:
        """loss_n (N,), float32, of a network output of any floating dtype."""
        error = output.float() - self.target(x0, noise, k)
        return self.weights(k) * error.square().flatten(1).mean(dim=1)
