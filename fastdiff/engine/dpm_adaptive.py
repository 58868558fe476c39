"""DPM-Solver's singlestep formulas in pairs, whose difference estimates the error, and the control of the step size.

With lambda = -log r and h = lambda' - lambda, for the state y = x / alpha. Lu et al. 2022, "DPM-Solver", equations 3.7
and algorithms 1 and 2, whose pairs 1-2 and 2-3 its adaptive solver uses; the control is that of Soderlind 2003,
"Digital filters in adaptive time-stepping", as k-diffusion (Katherine Crowson) has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.engine.network import AdaptiveStep, Callback, Network, column, too_tight
from fastdiff.noise import STREAM_STEP
from fastdiff.samplers.euler import ancestral_step
from fastdiff.schedules import Array

Flags = npt.NDArray[np.bool_]

SMALLEST_STEP = 1e-5
"""In lambda: what is left of the way is added to a step when it is less than this."""
NoisePrediction = Callable[[Tensor, Tensor], Tensor]


def pair(
    order: int, noise: NoisePrediction, y: Tensor, eps: Tensor, start: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """(the solution of order - 1, that of `order`), 2 or 3, at lambda = end, from y and eps = noise(y, r) at start.

    a(c) = y - r_c (e^(c h) - 1) eps is the state at lambda + c h, phi(h) = (e^h - 1)/h - 1. With c_1 = 1/order:
    1: a(1);    2: a(1) - r' (e^h - 1)/(2 c_1) (eps_1 - eps), eps_1 at a(c_1);
    3: a(1) - r' phi(h)/c_2 (eps_2 - eps), c_2 = 2/3, eps_2 at a(c_2) - r_2 (c_2/c_1) phi(c_2 h) (eps_1 - eps).
    start and end are numbers on the host, (groups,) or one without dimensions, whose dtype is that of the coefficients:
    the error is a small difference of the two solutions and shows their rounding.
    """
    h = end - start

    def forward(c: float, *terms: tuple[float, Tensor, Tensor]) -> Tensor:
        """a(c) minus r_c times each factor, over each divisor, times each tensor."""
        ratio = _ratio(c)
        state = y - _coefficient(ratio * (c * h).expm1(), y) * eps
        for divisor, factor, tensor in terms:
            state = state - _coefficient(ratio / divisor * factor, y) * tensor
        return state

    def _ratio(c: float) -> Tensor:
        return (end if c == 1.0 else start + c * h).neg().exp()

    c1, c2 = 1.0 / order, 2.0 / 3.0
    change1 = noise(forward(c1), _ratio(c1)) - eps
    second = forward(1.0, (2.0 * c1, h.expm1(), change1))
    if order == 2:
        return forward(1.0), second
    change2 = noise(forward(c2, (c1 / c2, _phi(c2 * h), change1)), _ratio(c2)) - eps
    return second, forward(1.0, (c2, _phi(h), change2))


def _coefficient(values: Tensor, like: Tensor) -> Tensor:
    """A number as it is, which every device takes, or a number for each sample."""
    return values if values.dim() == 0 else column(values, like)


def _phi(h: Tensor) -> Tensor:
    """(e^h - 1)/h - 1, 0 at h = 0."""
    return torch.where(h == 0.0, 0.0, h.expm1() / torch.where(h == 0.0, 1.0, h) - 1.0)


class Controller:
    """h' = h limit(w_0^b1 w_1^b2 w_2^b3), w the inverses of this and the last accepted errors, limit(f) = 1 +
    arctan(f - 1); a step counts where that factor is at least `safety`. One h for each sample, or one for all.

    b1 = (p + i + d)/order, b2 = -(p + 2 d)/order, b3 = d/order.
    """

    def __init__(self, h: Array, order: float, *, p: float, i: float, d: float, safety: float) -> None:
        self.h = h
        self._exponents = np.array([[p + i + d], [-(p + 2.0 * d)], [d]]) / order
        self._safety = safety
        self._inverses: Array | None = None

    def accept(self, error: Array, active: Flags) -> Flags:
        """Which of the active steps count; h becomes the next step, or the next try."""
        inverse = 1.0 / (error + 1e-8)
        if self._inverses is None:
            self._inverses = np.stack([inverse] * 3)
        self._inverses[0] = inverse
        factor = 1.0 + np.arctan(np.prod(self._inverses**self._exponents, axis=0) - 1.0)
        accepted = active & (factor >= self._safety)
        self._inverses[2][accepted] = self._inverses[1][accepted]
        self._inverses[1][accepted] = self._inverses[0][accepted]
        self.h = np.where(active, self.h * factor, self.h)
        return accepted


def dpm_adaptive(
    network: Network,
    y: Tensor,
    start: float,
    end: float,
    keys: Tensor,
    callback: Callback | None,
    *,
    order: int,
    rtol: float,
    atol: float,
    h_init: float,
    pcoeff: float,
    icoeff: float,
    dcoeff: float,
    accept_safety: float,
    eta: float,
    s_noise: float,
    per_sample: bool,
    max_steps: int,
) -> tuple[Tensor, int, int]:
    groups = len(y) if per_sample else 1
    place, last = np.full(groups, -math.log(start)), -math.log(end)
    # Noise in the steps lowers the order of the error.
    control_order = 1.5 if eta else float(order)
    gains = {"p": pcoeff, "i": icoeff, "d": dcoeff, "safety": accept_safety}
    control = Controller(np.full(groups, h_init), control_order, **gains)
    taken, tried = np.zeros(groups, dtype=int), np.zeros(groups, dtype=int)
    previous, eps = y, None
    while (active := place < last).any():
        to = np.where(place + control.h > last - SMALLEST_STEP, last, place + control.h)
        if tried.max() == max_steps:
            raise too_tight(rtol, atol, max_steps)
        down, up = to, np.zeros(groups)
        if eta:
            down, up = _split(place, to, last, eta)
        if eps is None:
            eps = network.noise(y, np.exp(-place))
        low, high = pair(order, network.noise, y, eps, torch.from_numpy(place), torch.from_numpy(down))
        error = scaled_error(low, high, previous, rtol, atol, groups)
        accepted = control.accept(error.double().cpu().numpy(), active)
        if accepted.any():
            if eta:
                high = high + column(s_noise * up, y) * _normal(keys, y.shape, taken)
            counts = torch.from_numpy(accepted).to(y.device).view(-1, *[1] * (y.dim() - 1))
            y, previous = torch.where(counts, high, y), torch.where(counts, low, previous)
            # A try that failed everywhere starts again from what is known.
            eps = None
        place = np.where(accepted, to, place)
        taken, tried = taken + accepted, tried + active
        if callback is not None:
            reached = tuple(np.exp(-place).tolist())
            callback(AdaptiveStep(network.evaluations, reached, tuple(accepted.tolist()), y))
    return y, int(taken.max()), int((tried - taken).max())


def _split(start: Array, to: Array, last: float, eta: float) -> tuple[Array, Array]:
    """(lambda to step to without noise, standard deviation of the noise that leads back to `to`)."""
    levels = [ancestral_step(r, r1, eta)[0] for r, r1 in zip(np.exp(-start), np.exp(-to), strict=True)]
    with np.errstate(divide="ignore"):
        down = np.minimum(last, -np.log(levels))
    return down, np.sqrt(np.maximum(np.exp(-2.0 * to) - np.exp(-2.0 * down), 0.0))


def scaled_error(low: Tensor, high: Tensor, previous: Tensor, rtol: float, atol: float, groups: int) -> Tensor:
    """Root mean square of (low - high) / max(atol, rtol |y|), one number for each group of samples."""
    allowed = torch.maximum(low.abs(), previous.abs()).mul_(rtol).clamp_(min=atol)
    ratio = ((low - high) / allowed).view(groups, -1)
    return torch.linalg.vector_norm(ratio, dim=1) / math.sqrt(ratio.shape[1])


def _normal(keys: Tensor, shape: torch.Size, steps: Array) -> Tensor:
    """Standard normal noise; each sample's counter is the number of steps that it has taken."""
    if len(steps) == 1:
        return ops.philox_normal(keys, tuple(shape), step=int(steps[0]), stream=STREAM_STEP)
    one = (1, *shape[1:])
    return torch.cat(
        [ops.philox_normal(keys[n : n + 1], one, step=int(step), stream=STREAM_STEP) for n, step in enumerate(steps)]
    )
