"""The samplers of reverse SDEs that ComfyUI lists, and UniPC, as loops in float64 from their papers' formulas.

`comfyui_loops` says what each takes. lam is log(alpha / s), and h how far a step raises it.
"""

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import torch
from comfyui_loops import Draw, Levels, Predict, lagrange, split
from torch import Tensor


def scale(s: float, flow: bool) -> float:
    return 1.0 - s if flow else 1.0


def lam(s: float, flow: bool) -> float:
    return math.log(scale(s, flow) / s) if s else math.inf


def level(at: float, flow: bool) -> float:
    """The level of a lambda."""
    return 1.0 / (1.0 + math.exp(at)) if flow else math.exp(-at)


def integral(weight: Callable[[np.ndarray], np.ndarray], start: float, end: float) -> float:
    points, weights = np.polynomial.legendre.leggauss(60)
    return (end - start) / 2.0 * float(weights @ weight((start + end) / 2.0 + (end - start) / 2.0 * points))


def seeds(
    f: Predict, z: Draw, x: Tensor, s: Levels, nodes: list[float], eta: float, s_noise: float, rule: str, flow: bool
) -> Tensor:
    """Each row is a step of the SDE from the start to a node, whose noise is that of the parts on the way."""
    k = 1.0 + eta
    for a, b in pairwise(s):
        first = f(x, a)[0]
        if not b:
            return first
        start, h = lam(a, flow), lam(b, flow) - lam(a, flow)
        known, noise, begun, at = [first], torch.zeros_like(x), 0.0, a
        for row, c in enumerate([*nodes, 1.0]):
            to = level(start + c * h, flow) if c < 1.0 else b
            span, total = k * c * h, -math.expm1(-k * c * h)
            if row == 0:
                mean = total * first
            elif rule == "midpoint":
                mean = total * (first + (known[-1] - first) * c / (2.0 * nodes[row - 1]))
            else:
                rising = integral(lambda u, w=span: w * np.exp(-w * (1.0 - u)) * u, 0.0, 1.0)
                mean = total * first + rising * (known[-1] - first) * c / nodes[row - 1]
            state = to / a * math.exp(-eta * c * h) * x + scale(to, flow) * mean
            if eta and s_noise:
                part = (c - begun) * h
                noise = math.exp(-eta * part) * noise + math.sqrt(max(-math.expm1(-2.0 * eta * part), 0.0)) * z()
                state = state + to * s_noise * noise
            begun = c
            if row < len(nodes):
                at = to
                known.append(f(state, at)[0])
        x = state
    return x


def er_sde(
    f: Predict,
    z: Draw,
    x: Tensor,
    s: Levels,
    flow: bool = False,
    stages: int = 3,
    s_noise: float = 1.0,
    phi: Callable[[float], float] = lambda r: r * (math.exp(r**0.3) + 10.0),
) -> Tensor:
    r = [v / scale(v, flow) for v in s]
    data: list[Tensor] = []
    slopes: list[Tensor] = []
    for i, (a, b) in enumerate(pairwise(s)):
        data.append(f(x, a)[0])
        if not b:
            return data[-1]
        c, alpha = phi(r[i + 1]) / phi(r[i]), scale(b, flow)
        y = c * x / scale(a, flow) + (1.0 - c) * data[-1]
        width = (r[i] - r[i + 1]) / 200.0
        points = [r[i + 1] + j * width for j in range(200)]
        sums = [width * sum((p - r[i]) ** n / phi(p) for p in points) for n in (0, 1)]
        if i >= 1 and stages >= 2:
            slopes.append((data[-1] - data[-2]) / (r[i] - r[i - 1]))
            y = y + (r[i + 1] - r[i] + phi(r[i + 1]) * sums[0]) * slopes[-1]
        if i >= 2 and stages >= 3:
            bend = 2.0 * (slopes[-1] - slopes[-2]) / (r[i] - r[i - 2])
            y = y + ((r[i + 1] - r[i]) ** 2 / 2.0 + phi(r[i + 1]) * sums[1]) * bend
        if s_noise:
            y = y + s_noise * math.sqrt(max(r[i + 1] ** 2 - (c * r[i]) ** 2, 0.0)) * z()
        x = alpha * y
    return x


def sa_solver(
    f: Predict,
    z: Draw,
    x: Tensor,
    s: Levels,
    tau: Callable[[float], float],
    flow: bool = False,
    predictor: int = 3,
    corrector: int = 4,
    pece: bool = False,
) -> Tensor:
    """x is corrected where a prediction has come, and then carried on."""
    steps, at = len(s) - 1, [lam(v, flow) for v in s]
    data: list[Tensor] = []

    def carried(state: Tensor, i: int, nodes: list[int], t: float) -> Tensor:
        """From level i to i + 1 with the polynomial through the predictions at `nodes`."""
        k, h = 1.0 + t**2, at[i + 1] - at[i]
        total = s[i + 1] / s[i] * math.exp(-(t**2) * h) * state
        for j, node in enumerate(nodes):

            def weight(u: np.ndarray, own: int = j) -> np.ndarray:
                return k * np.exp(-k * (at[i + 1] - u)) * lagrange([at[n] for n in nodes], u)[own]

            total = total + scale(s[i + 1], flow) * integral(weight, at[i], at[i + 1]) * data[node]
        return total

    predicted, noise, t = x, torch.zeros_like(x), 0.0
    for i in range(steps):
        data.append(f(predicted, s[i])[0])
        order = min(corrector, i + 1, steps - i if s[-1] == 0.0 else 99)
        corrects = i > 0 and order and (pece or s[i + 1])
        if corrects:
            x = carried(x, i - 1, list(range(i, i - order, -1)), t) + noise
            if pece:
                data[-1] = f(x, s[i])[0]
        else:
            x = predicted
        if not s[i + 1]:
            return data[-1]
        t = tau(s[i + 1])
        used = min(predictor, i + 1, steps - 1 - i if s[-1] == 0.0 else 99)
        h = at[i + 1] - at[i]
        noise = s[i + 1] * math.sqrt(-math.expm1(-2.0 * t**2 * h)) * z() if t else torch.zeros_like(x)
        predicted = carried(x, i, list(range(i, i - used, -1)), t) + noise
    return predicted


def unipc(f: Predict, z: Draw, x: Tensor, s: Levels, variant: str) -> Tensor:
    """Zhao et al. 2023, algorithms 5 to 8, for the data prediction; s ends above 0."""
    steps = len(s) - 1
    at, data = [-math.log(v) for v in s], [f(x, s[0])[0]]
    highest = min(3, steps - 1)
    for k in range(1, steps + 1):
        order, h = min(highest, k, steps + 1 - k), at[k] - at[k - 1]
        size = -h if variant == "bh1" else math.expm1(-h)
        nodes = [(at[k - 1 - j] - at[k - 1]) / h for j in range(1, order)] + [1.0]
        phi, b = math.expm1(-h) / -h - 1.0, []
        for n in range(1, order + 1):
            b.append(phi * math.factorial(n) / size)
            phi = phi / -h - 1.0 / math.factorial(n + 1)
        base = s[k] / s[k - 1] * x - math.expm1(-h) * data[-1]

        def added(values: list[Tensor], count: int, b: list[float] = b, nodes: list[float] = nodes) -> Tensor:
            matrix = np.vander(nodes[:count] if count == len(values) else nodes, len(values), increasing=True).T
            rho = [0.5] if len(values) == 1 else np.linalg.solve(matrix, b[: len(values)])
            return sum(float(w) * v for w, v in zip(rho, values, strict=True))

        earlier = [(data[-1 - j] - data[-1]) / nodes[j - 1] for j in range(1, order)]
        predicted = base - size * added(earlier, order - 1) if earlier else base
        if k == steps:
            return predicted
        new = f(predicted, s[k])[0]
        x = base - size * added([*earlier, new - data[-1]], order)
        data.append(new)
    return x


def dpmpp_2m_sde(
    f: Predict, z: Draw, x: Tensor, s: Levels, eta: float = 1.0, s_noise: float = 1.0, flow: bool = False
) -> Tensor:
    """With the midpoint rule."""
    before, h0 = None, 1.0
    for a, b in pairwise(s):
        data = f(x, a)[0]
        if not b:
            return data
        h = lam(b, flow) - lam(a, flow)
        mean = data if before is None else data + h / (2.0 * h0) * (data - before)
        x = b / a * math.exp(-eta * h) * x - scale(b, flow) * math.expm1(-(1.0 + eta) * h) * mean
        if eta:
            x = x + b * math.sqrt(-math.expm1(-2.0 * eta * h)) * s_noise * z()
        before, h0 = data, h
    return x


def dpmpp_sde(
    f: Predict, z: Draw, x: Tensor, s: Levels, eta: float = 1.0, r: float = 0.5, flow: bool = False
) -> Tensor:
    """Each of the two states is a step of its own from the start, with its own noise."""

    def step(a: float, b: float, data: Tensor, noise: Tensor) -> Tensor:
        d, u = split(a / scale(a, flow), b / scale(b, flow), eta)
        return scale(b, flow) * (data + d / (a / scale(a, flow)) * (x / scale(a, flow) - data) + u * noise)

    for a, b in pairwise(s):
        data = f(x, a)[0]
        if not b:
            return data
        q = level(lam(a, flow) + r * (lam(b, flow) - lam(a, flow)), flow)
        second = f(step(a, q, data, z()), q)[0]
        x = step(a, b, data + (second - data) / (2.0 * r), z())
    return x
