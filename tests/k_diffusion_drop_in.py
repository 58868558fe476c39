"""Our samplers beside k-diffusion's of the same name: calls of the model, callback, result and generator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from k_diffusion_peer import load
from torch import Tensor, nn

from fastdiff.integrations.k_diffusion import sampling as ours

SHAPE = (2, 3, 8, 8)


class Run(NamedTuple):
    """What a sampler did: (x, sigma) of each call of the model, what it told the callback, what it left and gave."""

    calls: list[tuple[Tensor, Tensor]]
    told: list[dict[str, Any]]
    result: Any
    generator: Tensor


def network() -> nn.Module:
    torch.manual_seed(11)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 3, 3, padding=1)).double()


NETWORK = network()


def denoiser(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
    """A random network with Karras's scalings; in float64, so that both sides get the same numbers."""
    wide, level = x.double(), sigma.double().view(-1, *[1] * (x.dim() - 1))
    total = 1.0 + level**2
    with torch.no_grad():
        return (wide / total + level / total.sqrt() * NETWORK(wide / total.sqrt())).to(x.dtype)


def start(scale: float = 20.0, dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(2))).to(dtype)


def karras(steps: int, low: float = 0.05, high: float = 20.0) -> Tensor:
    return load().sampling.get_sigmas_karras(steps, low, high)


def record(module: Any, name: str, *args: Any, model: Callable[..., Tensor] = denoiser, **options: Any) -> Run:
    calls: list[tuple[Tensor, Tensor]] = []
    told: list[dict[str, Any]] = []

    def recorded(x: Tensor, sigma: Tensor, **extra: Any) -> Tensor:
        calls.append((x.clone(), sigma.clone()))
        return model(x, sigma, **extra)

    def callback(info: dict[str, Any]) -> None:
        told.append({key: value.clone() if isinstance(value, Tensor) else value for key, value in info.items()})

    torch.manual_seed(5)
    if callable(options.get("noise_sampler")):
        options["noise_sampler"] = options["noise_sampler"]()
    result = getattr(module, f"sample_{name}")(recorded, *args, callback=callback, disable=True, **options)
    return Run(calls, told, result, torch.get_rng_state())


def both(name: str, *args: Any, **options: Any) -> tuple[Run, Run]:
    """(ours, theirs)."""
    return record(ours, name, *args, **options), record(load().sampling, name, *args, **options)


def assert_parity(name: str, *args: Any, levels: float = 0.0, **options: Any) -> Run:
    """Equal calls, callbacks and draws; every state and the result within a relative error of 1e-5.

    levels   the relative error of the numbers that the callback is told
    """
    mine, other = both(name, *args, **options)
    assert len(mine.calls) == len(other.calls)
    for index, ((x, sigma), (their_x, their_sigma)) in enumerate(zip(mine.calls, other.calls, strict=True)):
        assert_near(x, their_x, 1e-5, f"call {index}")
        assert_near(sigma, their_sigma, max(levels, 1e-6), f"sigma of call {index}")
    assert_near(mine.result, other.result, 1e-5, "result")
    assert len(mine.told) == len(other.told)
    for index, (info, expected) in enumerate(zip(mine.told, other.told, strict=True)):
        assert info.keys() == expected.keys()
        for key, value in expected.items():
            if key in ("x", "denoised"):
                assert_near(info[key], value, 1e-5, f"{key} told at {index}")
            elif isinstance(value, Tensor):
                assert_near(info[key], value, levels, f"{key} told at {index}")
            else:
                assert abs(info[key] - value) <= levels * abs(value)
    assert torch.equal(mine.generator, other.generator)
    return mine


def assert_near(value: Tensor, expected: Tensor, bound: float, what: str) -> None:
    assert value.dtype == expected.dtype, what
    assert value.shape == expected.shape, what
    error = distance(value, expected)
    assert error <= 1e-5, f"{what}: relative error {error:.1e}"


def distance(value: Tensor, expected: Tensor) -> float:
    """Relative error; 0 where both are 0."""
    difference = float((value.double() - expected.double()).norm())
    return difference / float(expected.double().norm()) if difference else 0.0
