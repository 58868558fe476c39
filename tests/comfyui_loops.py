"""The samplers that ComfyUI lists as loops in float64, from their papers' formulas.

Each takes (D, U), the predictions as functions of (x, s); z, which draws noise; x; s, the levels as numbers; and its
own options. alpha(s) is 1, or 1 - s on a flow, and r = s / alpha.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

Predict = Callable[[Tensor, float], tuple[Tensor, Tensor]]
Draw = Callable[[], Tensor]
Levels = list[float]


def split(r: float, r1: float, eta: float) -> tuple[float, float]:
    """(d, u) of an ancestral step."""
    u = min(r1, eta * r1 * math.sqrt(1.0 - (r1 / r) ** 2))
    return math.sqrt(r1**2 - u**2), u


def straight(s: float, s1: float, eta: float) -> tuple[float, float, float]:
    """Level, factor and noise of an ancestral step on a flow."""
    d = s1 * (1.0 - eta + eta * s1 / s)
    k = (1.0 - s1) / (1.0 - d)
    return d, k, math.sqrt(max(s1**2 - (k * d) ** 2, 0.0))


def half_way(s: float, d: float) -> float:
    """Between two levels of a flow, in log((1 - s) / s); from pure noise 0.9999."""
    if s == 1.0:
        return 0.9999
    odds = math.sqrt((1.0 - s) / s * (1.0 - d) / d)
    return 1.0 / (1.0 + odds)


def go(x: Tensor, data: Tensor, s: float, to: float) -> Tensor:
    """Along the straight line to the data."""
    return data + (to / s) * (x - data)


def euler_ancestral(f: Predict, z: Draw, x: Tensor, s: Levels, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:
    for a, b in pairwise(s):
        d, k, n = straight(a, b, eta)
        x = k * go(x, f(x, a)[0], a, d)
        if b and eta:
            x = x + n * s_noise * z()
    return x


def euler_ancestral_exploding(f: Predict, z: Draw, x: Tensor, s: Levels, eta: float) -> Tensor:
    """Of states x_0 + s epsilon; a step down to 0 adds no noise."""
    for a, b in pairwise(s):
        d, u = split(a, b, eta)
        x = go(x, f(x, a)[0], a, d)
        if d:
            x = x + u * z()
    return x


def dpm_2_ancestral(f: Predict, z: Draw, x: Tensor, s: Levels, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:
    for a, b in pairwise(s):
        d, k, n = straight(a, b, eta)
        data = f(x, a)[0]
        if not b:
            return data
        q = math.sqrt(a * d)
        inner = go(x, data, a, q)
        slope = (inner - f(inner, q)[0]) / q
        x = k * (x + (d - a) * slope) + n * s_noise * z()
    return x


def dpmpp_2s_ancestral(f: Predict, z: Draw, x: Tensor, s: Levels, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:
    for a, b in pairwise(s):
        d, k, n = straight(a, b, eta)
        data = f(x, a)[0]
        if not b:
            return data
        q = half_way(a, d)
        x = k * go(x, f(go(x, data, a, q), q)[0], a, d)
        if eta:
            x = x + n * s_noise * z()
    return x


def dpmpp_2s_ancestral_cfg_pp(
    f: Predict, z: Draw, x: Tensor, s: Levels, eta: float = 1.0, s_noise: float = 1.0, flow: bool = False
) -> Tensor:
    for a, b in pairwise(s):
        data, unguided = f(x, a)
        if not b:
            return data
        d, k, n = straight(a, b, eta) if flow else (split(a, b, eta)[0], 1.0, split(a, b, eta)[1])
        if not d:
            x = data + n * s_noise * z()
            continue
        q = half_way(a, d) if flow else math.sqrt(a * d)
        second = f(go(x, unguided, a, q), q)[1]
        x = k * go(x, second, a, d) + (1.0 - b if flow else 1.0) * (data - unguided)
        if eta or not flow:
            x = x + n * s_noise * z()
    return x


def euler_ancestral_cfg_pp(
    f: Predict, z: Draw, x: Tensor, s: Levels, eta: float = 1.0, s_noise: float = 1.0, flow: bool = False
) -> Tensor:
    for a, b in pairwise(s):
        data, unguided = f(x, a)
        if not b:
            return data
        alpha, alpha1 = (1.0 - a, 1.0 - b) if flow else (1.0, 1.0)
        noise = (x - alpha * unguided) / a
        r1 = b / alpha1
        # From pure noise all of the next level is fresh.
        d, u = (split(a / alpha, r1, eta) if alpha else (0.0, r1)) if eta else (r1, 0.0)
        x = alpha1 * (data + d * noise)
        if eta and s_noise:
            x = x + alpha1 * u * s_noise * z()
    return x


def dpmpp_2m_cfg_pp(f: Predict, z: Draw, x: Tensor, s: Levels) -> Tensor:
    before = None
    for i, (a, b) in enumerate(pairwise(s)):
        data, unguided = f(x, a)
        x = data + b / a * (x - unguided)
        if before is not None and b:
            x = x + (1.0 - b / a) * math.log(a / b) / (2.0 * math.log(s[i - 1] / a)) * (data - before)
        before = unguided
    return x


def res_multistep(
    f: Predict, z: Draw, x: Tensor, s: Levels, eta: float = 0.0, s_noise: float = 1.0, guided: bool = False
) -> Tensor:
    before, h0 = None, 0.0
    for a, b in pairwise(s):
        data, unguided = f(x, a)
        base = unguided if guided else data
        d, u = split(a, b, eta) if eta else (b, 0.0)
        if before is None or not d:
            x = data + d / a * (x - base)
        else:
            h = math.log(a / d)
            phi1 = -math.expm1(-h) / h
            phi2 = (1.0 - phi1) / h
            slope = (base - before) / h0
            x = math.exp(-h) * (x + data - base) + h * (phi1 * base + phi2 * h * slope)
        if b:
            x = x + u * s_noise * z()
        before, h0 = base, math.log(a / d) if d else math.inf
    return x


def gradient_estimation(
    f: Predict, z: Draw, x: Tensor, s: Levels, ge_gamma: float = 2.0, guided: bool = False
) -> Tensor:
    before = None
    for a, b in pairwise(s):
        data, unguided = f(x, a)
        if not b:
            return data
        d = (x - (unguided if guided else data)) / a
        x = data + b * d
        if before is not None:
            x = x + (b - a) * (ge_gamma - 1.0) * (d - before)
        before = d
    return x


def ddpm(f: Predict, z: Draw, x: Tensor, s: Levels) -> Tensor:
    """The posterior of x_(t-1) given x_t and x_0: Ho et al. 2020, equation 7."""
    for a, b in pairwise(s):
        data = f(x, a)[0]
        bar, bar1 = 1.0 / (1.0 + a**2), 1.0 / (1.0 + b**2)
        beta = 1.0 - bar / bar1
        mean = (math.sqrt(bar1) * beta * data + math.sqrt(1.0 - beta) * (1.0 - bar1) * x * math.sqrt(bar)) / (1.0 - bar)
        if b:
            mean = mean + math.sqrt((1.0 - bar1) / (1.0 - bar) * beta) * z()
        x = mean / math.sqrt(bar1)
    return x


def lcm(
    f: Predict, z: Draw, x: Tensor, s: Levels, s_noise: float = 1.0, s_noise_end: float | None = None, clip: float = 0.0
) -> Tensor:
    steps = len(s) - 1
    for i, (a, b) in enumerate(pairwise(s)):
        x = f(x, a)[0]
        if b:
            noise = z()
            bound = clip * noise.std() if clip else torch.tensor(math.inf)
            factor = s_noise + ((s_noise_end or s_noise) - s_noise) * i / (steps - 1)
            x = x + b * factor * noise.clamp(-bound, bound)
    return x


def heunpp2(f: Predict, z: Draw, x: Tensor, s: Levels) -> Tensor:
    def slope(y: Tensor, at: float) -> Tensor:
        return (y - f(y, at)[0]) / at

    for i, (a, b) in enumerate(pairwise(s)):
        d, left = [slope(x, a)], len(s) - 2 - i
        y, stages = x, min(left, 2)
        for j in range(stages):
            y = y + (s[i + j + 1] - s[i + j]) * d[-1]
            d.append(slope(y, s[i + j + 1]))
        weights = [s[i + j] / ((stages + 1) * s[0]) for j in range(1, stages + 1)]
        x = x + (b - a) * sum(w * v for w, v in zip([1.0 - sum(weights), *weights], d, strict=True))
    return x


def adams(weights: Callable[[Levels, float], Any], order: int) -> Callable[..., Tensor]:
    """x' = x + sum of weights * slopes, the weights of (the levels of the slopes, the newest first; the end)."""

    def loop(f: Predict, z: Draw, x: Tensor, s: Levels) -> Tensor:
        slopes: list[Tensor] = []
        for i, (a, b) in enumerate(pairwise(s)):
            data = f(x, a)[0]
            slopes = [(x - data) / a, *slopes][:order]
            known = [s[i - j] for j in range(len(slopes))]
            x = x + sum(w * d for w, d in zip(weights(known, b), slopes, strict=True)) if b else data
        return x

    return loop


def equal_steps(known: Levels, end: float) -> list[float]:
    table = {1: [1.0], 2: [1.5, -0.5], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}
    return [(end - known[0]) * w for w in table[len(known)]]


def lagrange(nodes: list[float], at: np.ndarray) -> list[np.ndarray]:
    return [
        np.prod([(at - other) / (own - other) for other in nodes if other != own] or [np.ones_like(at)], axis=0)
        for own in nodes
    ]


def in_sigma(known: Levels, end: float) -> list[float]:
    points, weights = np.polynomial.legendre.leggauss(8)
    at = (known[0] + end) / 2.0 + (end - known[0]) / 2.0 * points
    return [(end - known[0]) / 2.0 * float(weights @ values) for values in lagrange(known, at)]


def in_time(known: Levels, end: float) -> list[float]:
    """The mean over 10,000 even times of the VP SDE that Karras et al. 2022, table 1, have for 0.002 to 80."""
    low, high, first = math.log1p(0.002**2), math.log1p(80.0**2), 0.001
    rise = 2.0 * (low / first - high) / (first - 1.0)
    least = high - rise / 2.0

    def time(sigma: float) -> float:
        return max(float(root.real) for root in np.roots([rise / 2.0, least, -math.log1p(sigma**2)]))

    if len(known) == 1:
        return [end - known[0]]
    t = np.linspace(time(known[0]), time(end), 10_000)
    integral = rise / 2.0 * t**2 + least * t
    slope = (rise * t + least) * np.exp(integral) / (2.0 * np.sqrt(np.expm1(integral)))
    return [float(np.mean(slope * values) * (t[-1] - t[0])) for values in lagrange([time(v) for v in known], t)]
