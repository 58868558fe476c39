"""Guidance: how several outputs of the network, or a classifier's gradient, become the one model output of a step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.errors import InputError
from fastdiff.ops.row import INPUT_SCALE, PREDICTION
from fastdiff.samplers.table import StepTable
from fastdiff.schedules import Array

LogProbability = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """m = out_0 + sum_k scale_k (out_k - out_0), out_0 without a condition, out_k with the k-th.

    scale            one number, or one for each condition; None calls the network without groups. The denoiser gets
                     the groups along the batch, [uncond; cond_1; ...; cond_K]. One condition: classifier-free
                     guidance, Ho and Salimans 2022; several: Liu et al. 2022, "Compositional Visual Generation".
    rescale          phi in [0, 1]: m is multiplied by phi std(out_1) / std(m) + 1 - phi, against overexposure. Lin et
                     al. 2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", section 3.4.
    interval         (low, high): guidance only where low < sigma / alpha <= high; elsewhere the network is called with
                     the first condition alone, which takes half the time. Kynkaanniemi et al. 2024.
    perpendicular    of the second and further conditions only the part perpendicular to the first counts: with
                     scale=(7, -4) the second is a negative prompt that cannot undo the first. Armandpour et al. 2023.
    classifier       (x, t) -> log p(y | x), (N,), by whose gradient the data prediction is moved; it is given the
                     network's input. Dhariwal and Nichol 2021, "Diffusion Models Beat GANs", algorithm 2.
    classifier_scale   factor of that gradient
    """

    scale: float | tuple[float, ...] | None = None
    rescale: float = 0.0
    interval: tuple[float, float] | None = None
    perpendicular: bool = False
    classifier: LogProbability | None = None
    classifier_scale: float = 1.0

    def __post_init__(self) -> None:
        for value in self.scales:
            finite("guidance", value)
        finite("classifier_scale", self.classifier_scale)
        if self.scale is None and self.classifier is None:
            raise InputError("guidance: expected a scale or a classifier, got neither; leave guidance out")
        if self.scale is not None and not self.scales:
            raise InputError("guidance: expected a number for each condition, got none; leave scale out")
        finite("rescale", self.rescale)
        if not 0.0 <= self.rescale <= 1.0:
            raise InputError(f"rescale: expected a number from 0 to 1, got {self.rescale!r}")
        if self.rescale and not self.scales:
            raise InputError("rescale: expected 0 without a scale, since there is no condition to compare with")
        if not isinstance(self.perpendicular, bool):
            raise InputError(f"perpendicular: expected True or False, got {self.perpendicular!r}")
        if self.classifier is not None and not callable(self.classifier):
            raise InputError(f"classifier: expected a function (x, t) -> log p(y | x), got {self.classifier!r}")
        if self.perpendicular and len(self.scales) < 2:
            raise InputError(
                f"perpendicular: expected scales of at least two conditions, got {self.scale!r}; pass scale=(7, -4)"
            )
        if self.interval is not None:
            _check_interval(self.interval)

    @property
    def scales(self) -> tuple[float, ...]:
        """One number for each condition."""
        if self.scale is None:
            return ()
        return tuple(self.scale) if isinstance(self.scale, tuple | list) else (self.scale,)

    @property
    def groups(self) -> int:
        """How often the batch is repeated for the network while guidance is on."""
        return 1 + len(self.scales)


def finite(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(f"{name}: expected a finite number or None, got {value!r}")


def _check_interval(interval: tuple[float, float]) -> None:
    if not isinstance(interval, tuple | list) or len(interval) != 2:
        raise InputError(f"interval: expected (low, high) in sigma / alpha, got {interval!r}")
    low, high = interval
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in interval)
    if not (numbers and 0.0 <= low < high):
        raise InputError(f"interval: expected 0 <= low < high in sigma / alpha, got {interval!r}")


class Guide:
    """Guidance at work in one run: the table with its scale, the groups of each row, the weights of each output."""

    def __init__(self, guidance: Guidance | None, table: StepTable, samples: int, device: torch.device) -> None:
        self._guidance = guidance
        self.table = table
        self.groups = [1] * len(table)
        self._weights: Tensor | None = None
        self._slopes = [0.0] * len(table)
        if guidance is None:
            return
        inside = _inside(guidance.interval, table.levels)
        self.groups = [guidance.groups if on else 1 for on in inside]
        plain = len(guidance.scales) == 1 and not guidance.rescale
        if plain:
            self.table = table.with_guidance(guidance.scales[0])
        elif guidance.scales:
            self._weights = torch.tensor([[1.0, *guidance.scales]] * samples, device=device)
        if guidance.classifier is not None:
            slopes = guidance.classifier_scale * _gradient_slopes(table)
            self._slopes = [slope if on else 0.0 for slope, on in zip(slopes.tolist(), inside, strict=True)]

    def add_gradient(self, row: int, output: Tensor, model_input: Tensor, t: Tensor) -> Tensor:
        """The output of that row with the classifier's gradient, as it is without one."""
        if not self._slopes[row]:
            return output
        assert self._guidance is not None
        assert self._guidance.classifier is not None
        groups, channels = self.groups[row], model_input.shape[1]
        samples = model_input.shape[0] // groups
        with torch.inference_mode(False), torch.enable_grad():
            x = model_input[:samples].clone().float().requires_grad_()
            log_probability = self._guidance.classifier(x, t[:samples].clone())
            if not isinstance(log_probability, Tensor) or log_probability.shape != (samples,):
                raise InputError(
                    f"classifier: expected log p(y | x) of shape ({samples},), got "
                    f"{tuple(getattr(log_probability, 'shape', ()))}; sum over all but the batch"
                )
            (gradient,) = torch.autograd.grad(log_probability.sum(), x)
        moved = output.clone()
        # The same to every group: the weights of the differences leave it as it is.
        moved[:, :channels] += (self._slopes[row] * gradient).to(output.dtype).repeat(groups, *(1,) * (x.dim() - 1))
        return moved

    def weights(self, row: int, output: Tensor, channels: int) -> Tensor | None:
        """Those of the groups in each sample; None where the row's own guidance says it."""
        if self._weights is None or self.groups[row] == 1:
            return None
        assert self._guidance is not None
        if not self._guidance.rescale and not self._guidance.perpendicular:
            return self._weights
        return ops.guidance_weights(
            output,
            self._weights,
            rescale=self._guidance.rescale,
            perpendicular=self._guidance.perpendicular,
            channels=channels,
        )


def _inside(interval: tuple[float, float] | None, levels: Array) -> list[bool]:
    if interval is None:
        return [True] * len(levels)
    low, high = interval
    return [bool(low * signal < noise <= high * signal) for signal, noise in levels]


def _gradient_slopes(table: StepTable) -> Array:
    """d m / d gradient of each row: the data prediction D = ... + am m moves by (noise^2 / signal) grad log p.

    The gradient is taken at the network's input, input_scale * state. A Langevin row's D is the score, which moves by
    the gradient itself; where no signal is left a classifier has nothing to say.
    """
    input_scale = np.append(table.first_input_scale, table.rows[:-1, INPUT_SCALE])
    signal, noise = table.levels.T
    of_m = table.rows[:, PREDICTION][:, 1]
    said = (signal != 0.0) & (of_m != 0.0)
    of_data = np.where(table.snr > 0.0, 1.0, noise**2 / np.where(said, signal, 1.0))
    return np.where(said, input_scale * of_data / np.where(said, of_m, 1.0), 0.0)
