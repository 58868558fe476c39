"""What solvers with adaptive steps share: the network as a function of the state y = x / alpha = x_0 + r epsilon and of
r = sigma / alpha, and what a callback is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdiff.errors import InputError
from fastdiff.samplers.problem import Problem
from fastdiff.schedules import Array


@dataclass(frozen=True)
class AdaptiveStep:
    """What a callback is told after each try of a step.

    evaluations    calls of the network so far
    ratios         sigma / alpha of the state, one number for each sample, or one for all
    accepted       whether the try counts, likewise
    x              the state y = x / alpha, float32: after the try, for rk45 before it. Read it, do not write to it
    """

    evaluations: int
    ratios: tuple[float, ...]
    accepted: tuple[bool, ...]
    x: Tensor


Callback = Callable[[AdaptiveStep], None]


def column(values: Sequence[float] | Array | Tensor, like: Tensor) -> Tensor:
    """One float32 number for each sample, or one for all, shaped to be multiplied with the state."""
    return torch.as_tensor(values, dtype=torch.float32, device=like.device).view(-1, *[1] * (like.dim() - 1))


class Network:
    """D and epsilon of a denoiser as `fastdiff.run` takes it; counts its calls in `evaluations`.

    Errors: InputError for an output of another shape, or that is not finite (which waits for the device).
    """

    def __init__(
        self,
        denoiser: Callable[[Tensor, Tensor], Tensor],
        problem: Problem,
        dtype: torch.dtype,
        guidance: float | None,
    ) -> None:
        self.evaluations = 0
        self._denoiser, self._problem, self._dtype, self._guidance = denoiser, problem, dtype, guidance

    def data(self, y: Tensor, ratios: Sequence[float] | Array | Tensor) -> Tensor:
        """D(y, r), float32; ratios has one r for each sample, or one for all."""
        points = [self._problem.at_ratio(ratio, scaled=True) for ratio in map(float, ratios)]
        scale = column([point.input_scale for point in points], y)
        times = column([point.timestep for point in points], y).flatten().expand(len(y))
        m = self._call((scale * y).to(self._dtype), times).float()
        if self._guidance is not None:
            unconditional, conditional = m.chunk(2)
            m = unconditional + self._guidance * (conditional - unconditional)
        data = column([point.data.x for point in points], y) * y + column([point.data.m for point in points], y) * m
        clip = self._problem.clip
        return data if clip is None else data.clamp(-clip, clip)

    def noise(self, y: Tensor, ratios: Sequence[float] | Array | Tensor) -> Tensor:
        """epsilon(y, r) = (y - D) / r."""
        return (y - self.data(y, ratios)) / column(ratios, y)

    def _call(self, model_input: Tensor, times: Tensor) -> Tensor:
        if self._guidance is not None:
            model_input, times = torch.cat([model_input] * 2), times.repeat(2)
        output = self._denoiser(model_input, times)
        self.evaluations += 1
        if not isinstance(output, Tensor) or output.shape != model_input.shape:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(f"denoiser: expected an output of shape {tuple(model_input.shape)}, got {got}")
        if not bool(torch.isfinite(output).all()):
            raise InputError(f"denoiser: gave numbers that are not finite at t = {float(times[0]):g}")
        return output


def too_tight(rtol: float, atol: float, max_steps: int) -> InputError:
    return InputError(
        f"rtol, atol: {rtol:g} and {atol:g} are not met within max_steps={max_steps} tries of a step in float32; pass "
        "larger tolerances, such as the defaults, or more steps"
    )
