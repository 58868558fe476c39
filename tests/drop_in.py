"""Drop-in schedulers beside diffusers' own: the same state, network output and generator for both, step by step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import lru_cache
from typing import Any

import diffusers
import torch
from torch import Tensor

import fastdiff.integrations.diffusers as drop_in

SHAPE = (2, 4, 8, 8)
PARITY = 1e-5
Network = Callable[[Tensor, Any], Tensor]


def network(x: Tensor, t: Any) -> Tensor:
    """Near to its input, as a noise prediction is where there is much noise, but not a linear function of it."""
    return (0.9 * x.float() + 0.3 * torch.tanh(2.0 * x.float())).to(x.dtype)


def with_variance(x: Tensor, t: Any) -> Tensor:
    """The same with as many variance channels after it."""
    return torch.cat([network(x, t), torch.sin(3.0 * x.float()).to(x.dtype)], dim=1)


def pair(name: str, config: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    """Our class and diffusers' class of that name, both from the same configuration."""
    return made(drop_in, name, config), made(diffusers, name, config)


def made(library: Any, name: str, config: Mapping[str, Any] | None = None) -> Any:
    """A scheduler of diffusers or of ours; a copy of an earlier one where the configuration is plain, since some take
    longer to make than to test."""
    items = (config or {}).items()
    if not all(value is None or isinstance(value, str | int | float) for _, value in items):
        return getattr(library, name)(**dict(items))
    return deepcopy(_made(library, name, tuple((key, type(value), value) for key, value in items)))


@lru_cache(maxsize=64)
def _made(library: Any, name: str, items: tuple[tuple[str, type, Any], ...]) -> Any:
    return getattr(library, name)(**{key: value for key, _, value in items})


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def index_of(scheduler: Any) -> Any:
    return getattr(scheduler, "step_index", None)


def start(scheduler: Any, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return (noise * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)


def assert_parity(
    name: str,
    config: Mapping[str, Any] | None = None,
    *,
    steps: int | None = 10,
    set_options: Mapping[str, Any] | None = None,
    step_options: Mapping[str, Any] | None = None,
    begin: int | None = None,
    skip: int = 0,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = SHAPE,
    model: Network = network,
    bound: float = PARITY,
) -> None:
    """Every step from their state: timesteps, levels, scaled inputs, generators, counters and every result agree.

    Where diffusers ends in NaN or infinity so do we, and the comparison ends.

    begin   what `set_begin_index` is given, and where both start; skip: where both start without its being called
    """
    ours, theirs = pair(name, config)
    arguments = {**({} if steps is None else {"num_inference_steps": steps}), **(set_options or {})}
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(**arguments)
        if begin is not None:
            scheduler.set_begin_index(begin)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=0.0, atol=0.0, equal_nan=True)
    generators = [torch.Generator().manual_seed(7) for _ in range(2)]
    takes = "generator" in inspect.signature(theirs.step).parameters
    x = start(theirs, shape, dtype)
    for index in range(skip if begin is None else begin, len(theirs.timesteps)):
        inputs, results, states = [], [], []
        m = None
        for scheduler, generator in zip((theirs, ours), generators, strict=True):
            t = scheduler.timesteps[index]
            inputs.append(scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x)
            m = model(inputs[0], t) if m is None else m
            # torch.manual_seed notes for a GPU where it was called, which takes longer than a step.
            torch.default_generator.manual_seed(index)
            options = {**(step_options or {}), **({"generator": generator} if takes else {})}
            results.append(scheduler.step(m, t, x, return_dict=False, **options))
            generated = (each.numpy().tobytes() for each in (generator.get_state(), torch.get_rng_state()))
            states.append([*generated, index_of(scheduler)])
        assert relative(inputs[1], inputs[0]) < 1e-6, f"step {index}: the network's input"
        assert len(results[0]) == len(results[1])
        for number, (their, our) in enumerate(zip(*results, strict=True)):
            assert our.shape == their.shape
            assert our.dtype == their.dtype
            if not their.isfinite().all():
                assert torch.equal(our.isfinite(), their.isfinite()), (
                    f"step {index}, result {number}: not finite elsewhere"
                )
                return
            error = relative(our, their)
            assert error < bound, f"step {index}, result {number}: relative error {error:.1e}"
        for what, their, our in zip(("generator", "global generator", "step_index"), *states, strict=True):
            assert our == their, f"step {index}: {what}"
        x = results[0][0]


def assert_close_in_half(name: str, config: Mapping[str, Any] | None, dtype: torch.dtype, **options: Any) -> None:
    """With half-precision tensors every result has diffusers' dtype and is at least as near as diffusers' to what
    diffusers gives for the same tensors in float32."""
    steps, set_options = options.pop("steps", 10), options.pop("set_options", {})
    step_options, model = options.pop("step_options", {}), options.pop("model", network)
    ours, theirs = pair(name, config)
    truth = pair(name, config)[1]
    for scheduler in (ours, theirs, truth):
        scheduler.set_timesteps(steps, **set_options)
    x = start(theirs, SHAPE, dtype)
    for index in range(len(theirs.timesteps)):
        results = []
        m = None
        for scheduler in (truth, theirs, ours):
            t = scheduler.timesteps[index]
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            m = model(scaled.to(dtype), t) if m is None else m
            torch.default_generator.manual_seed(index)
            exact = (m.float(), t, x.float()) if scheduler is truth else (m, t, x)
            noise = torch.Generator().manual_seed(index)
            given = {"generator": noise} if "generator" in inspect.signature(theirs.step).parameters else {}
            results.append(scheduler.step(*exact, return_dict=False, **{**step_options, **given}))
        for exact_result, their, our in zip(*results, strict=True):
            assert our.dtype == their.dtype
            ours_error, their_error = relative(our, exact_result), relative(their, exact_result)
            assert ours_error <= 1.01 * their_error + 2.0**-23, f"step {index}: {ours_error:.1e} > {their_error:.1e}"
        x = results[1][0].to(dtype)
