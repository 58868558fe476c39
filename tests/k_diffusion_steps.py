"""Our tables beside k-diffusion's samplers: the same start, network and noise, the state before every evaluation."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from k_diffusion_peer import load
from torch import Tensor

from fastdiff import ops, samplers, schedules
from fastdiff.samplers import StepTable

SHAPE = (2, 3, 8, 8)
SCHEDULE = schedules.ve(1000, sigma_min=0.02, sigma_max=80.0)


def denoise(x: Tensor, sigma: float) -> Tensor:
    """A bounded, wavy data prediction."""
    wide = x.double()
    return torch.tanh(wide / (1.0 + sigma**2) ** 0.5 + 0.3 * torch.sin(3.0 * wide / (1.0 + sigma))).float()


def noises() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(5)
    while True:
        yield torch.randn(SHAPE, generator=generator)


def start(sigma: float) -> Tensor:
    return sigma * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))


def their_states(name: str, sigmas: Tensor, **options: Any) -> tuple[list[Tensor], list[float]]:
    """The states after each network call (before the next, and the result) of `sample_<name>`, and its calls' sigmas.

    `noise_sampler=True` among the options hands the noise of `noises` in; functions without one draw it by
    torch.randn_like, which the caller patches.
    """
    states, levels, drawn = [], [], noises()

    def model(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        states.append(x.clone())
        levels.append(float(sigma[0]))
        return denoise(x, levels[-1])

    if options.pop("noise_sampler", False):
        options["noise_sampler"] = lambda *_: next(drawn)
    function: Callable[..., Tensor] = getattr(load().sampling, f"sample_{name}")
    result = function(model, start(float(sigmas[0])), sigmas, disable=True, **options)
    return [*states[1:], result], levels


def our_states(table: StepTable, drawn: Iterator[Tensor] | None = None) -> list[Tensor]:
    """The states after each row in float32, from the same start and with the same noise."""
    x, rows = start(float(table.grid.sigmas[0])), table.tensor()
    drawn = noises() if drawn is None else drawn
    anchor, history, result = None, (), []
    for index, use in enumerate(table.uses):
        m = denoise(x, float(table.timesteps[index]))
        given = {"anchor": anchor if use.anchor else None, "history": history[: use.history]}
        wanted = {"new_history": use.new_history, "new_anchor": use.new_anchor}
        noise = next(drawn) if use.noise else None
        step = ops.sampler_step(x, m, rows, index, noise=noise, **given, **wanted)
        history = history if step.history is None else (step.history, *history[:2])
        anchor = anchor if step.anchor is None else step.anchor
        x = step.x
        result.append(x)
    return result


def assert_parity(method: str, name: str, sigmas: Tensor, *, their: dict[str, Any] | None = None, **options: Any):
    """Every network call at the same sigma on the same state, and the same result, relative error 1e-5 in float32."""
    table = samplers.build(method, schedule=SCHEDULE, prediction="sample", sigmas=sigmas.tolist(), **options)
    theirs, levels = their_states(name, sigmas, **(their or {}))
    ours = our_states(table)
    assert len(ours) == len(theirs)
    torch.testing.assert_close(torch.tensor(table.timesteps), torch.tensor(levels).double(), rtol=1e-6, atol=0.0)
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        error = float((mine.double() - other.double()).norm() / other.double().norm())
        assert error < 1e-5, f"row {index}: relative error {error:.1e}"
