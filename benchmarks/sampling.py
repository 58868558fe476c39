"""The whole loop: images of the embedded model, by a plain PyTorch loop, by diffusers, and by us."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import fastdiff
from benchmarks.cases import Case
from benchmarks.work import AUTOMATIC, Work
from fastdiff import ops, samplers
from fastdiff.ops.row import CLIP, INPUTS, NEW_X, PREDICTION
from fastdiff.samplers.table import StepTable

MODEL, GUIDANCE = "fashion", 2.0
CLASSES = {"ddim": "DDIMScheduler", "dpmpp_2m": "DPMSolverMultistepScheduler"}
# Only DDIM clips the data prediction in diffusers.
CLIPS = {"ddim": 1.0, "dpmpp_2m": None}


def build(case: Case, device: torch.device) -> Work:
    method, _, count = case.variant.partition("-")
    steps, dtype = int(count), getattr(torch, case.dtype)
    model = fastdiff.load_model(MODEL)
    network = diffusers_network(model).to(device)
    model.network.to(device=device, dtype=dtype)
    options = {**samplers.find(method).diffusers, "clip": CLIPS[method]}
    table = samplers.build(method, schedule=model.schedule, steps=steps, prediction=model.prediction, **options)
    seeds = range(case.shape[0])
    noise = ops.philox_normal(torch.tensor(seeds, device=device), case.shape)
    assert model.num_classes is not None
    classes = [seed % model.num_classes for seed in seeds]
    labels = torch.tensor([model.null_label] * len(classes) + classes, device=device)

    def loop(net: torch.nn.Module, kind: torch.dtype) -> Tensor:
        state = torch.float64 if kind == torch.float64 else torch.float32
        return plain_loop(net, table, noise.to(state), labels, kind).clamp(-1, 1)

    typed = copy.deepcopy(network).to(dtype)
    scheduler = diffusers_scheduler(method, model)
    return Work(
        peers={
            "pytorch": lambda: loop(typed, dtype),
            "diffusers": lambda: diffusers_loop(typed, scheduler, steps, noise, labels, dtype).clamp(-1, 1),
        },
        ours=lambda: fastdiff.sample(
            model, method=method, steps=steps, seeds=seeds, labels=classes, guidance=GUIDANCE, progress=False, **options
        ),
        truth=_truth(case.variant, case.shape, lambda: loop(copy.deepcopy(network).double(), torch.float64)),
        plain=loop(typed, dtype),
        flops=steps * _flops(network, torch.cat([noise, noise]), labels),
        steps=steps,
        backends=(AUTOMATIC, "native", "triton", "reference"),
    )


_truths: dict[tuple[str, tuple[int, ...]], Tensor] = {}


def _truth(variant: str, shape: tuple[int, ...], compute: Callable[[], Tensor]) -> Tensor:
    """The float64 result, computed once for all dtypes of a case."""
    if (variant, shape) not in _truths:
        _truths[variant, shape] = compute()
    return _truths[variant, shape]


def diffusers_network(model: Any) -> torch.nn.Module:
    """The library's own class with the model's weights."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    config = {key: value for key, value in model.network.config.items() if not key.startswith("_")}
    network = getattr(diffusers, model.network.config["_class_name"])(**config)
    network.load_state_dict(model.network.state_dict())
    return network.eval().requires_grad_(False)


def diffusers_scheduler(method: str, model: Any) -> Any:
    import diffusers

    alpha2 = model.schedule.alphas**2
    betas = 1.0 - alpha2 / [1.0, *alpha2[:-1]]
    prediction = {"v": "v_prediction"}.get(model.prediction, model.prediction)
    return getattr(diffusers, CLASSES[method])(trained_betas=betas, prediction_type=prediction)


def plain_loop(net: Any, table: StepTable, x: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """A loop in plain PyTorch with the table's coefficients as numbers, the state in x's dtype."""
    previous = x
    for t, row in zip(table.timesteps.tolist(), table.rows.tolist(), strict=True):
        output = net(torch.cat([x, x]).to(dtype), torch.tensor(t), class_labels=labels).sample.to(x.dtype)
        unconditional, conditional = output.chunk(2)
        m = unconditional + GUIDANCE * (conditional - unconditional)
        of_x, of_m = row[PREDICTION]
        data = of_x * x + of_m * m
        if math.isfinite(row[CLIP]):
            data = data.clamp(-row[CLIP], row[CLIP])
        c = dict(zip(INPUTS, row[NEW_X], strict=True))
        x = c["x"] * x + c["m"] * m + c["D"] * data + c["hist1"] * previous
        previous = data
    return x


def diffusers_loop(net: Any, scheduler: Any, steps: int, x: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """What the library's pipelines do."""
    scheduler.set_timesteps(steps, device=x.device)
    for t in scheduler.timesteps:
        model_input = scheduler.scale_model_input(torch.cat([x, x]), t)
        output = net(model_input.to(dtype), t, class_labels=labels).sample
        unconditional, conditional = output.chunk(2)
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        x = scheduler.step(guided, t, x, return_dict=False)[0]
    return x


@cache
def _flops(network: Any, x: Tensor, labels: Tensor) -> int:
    with FlopCounterMode(display=False) as counter:
        network(x, 1, class_labels=labels)
    return int(counter.get_total_flops())
