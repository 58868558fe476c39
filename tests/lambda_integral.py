"""The integrals of DPM-Solver and DPM-Solver++ over a step in lambda, by quadrature."""

from collections.abc import Sequence

import numpy as np

NODES, WEIGHTS = np.polynomial.legendre.leggauss(60)


def integral(
    rate: float,
    h: float,
    values: Sequence[np.ndarray],
    places: Sequence[float],
    solver: str,
    half: bool = False,
) -> np.ndarray:
    """int_0^h e^(rate (h - u)) P(u) du; P has values[0] at 0 and the others at `places`, negative for the past.

    "heun": P is the polynomial through all of them, with half of P'' where `half`. "midpoint": the line through two of
    them, taken at h/2; of three, the line through the first and the third.
    """
    u = 0.5 * h * (NODES + 1.0)
    kernel = 0.5 * h * WEIGHTS * np.exp(rate * (h - u))
    constant = kernel.sum() * values[0]
    if len(values) == 1:
        return constant
    slopes = [(value - values[0]) / place for value, place in zip(values[1:], places, strict=True)]
    if solver == "midpoint":
        return constant + (kernel.sum() * h / 2.0 if len(values) == 2 else (kernel * u).sum()) * slopes[-1]
    if len(values) == 2:
        return constant + (kernel * u).sum() * slopes[0]
    square = (slopes[1] - slopes[0]) / (places[1] - places[0])
    slope = slopes[0] - square * places[0]
    return constant + (kernel * u).sum() * slope + (kernel * u**2).sum() * square * (0.5 if half else 1.0)
