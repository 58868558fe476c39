"""Every kind of network that is accelerated, tiny, and what a call of it gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import tiny_pipelines as tiny
import torch
from torch import Tensor, nn

import fastdiff

TIMES = torch.tensor([900, 500, 100])
Call = Callable[[nn.Module, torch.dtype, int], Any]


@cache
def picture(side: int, dtype: torch.dtype) -> Tensor:
    """What a ControlNet goes by is one tensor in all calls of a run."""
    return tiny.random(2, 3, side, side).to(dtype)


KINDS: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "UNet2DModel": (tiny.pixel_unet, lambda m, d, s: m(tiny.random(2, 3, s, s).to(d), TIMES[1])),
    "UNet2DConditionModel": (tiny.unet, lambda m, d, s: m(tiny.random(2, 4, s, s).to(d), TIMES[1], m.text)),
    "UNet2DConditionModel XL": (
        tiny.unet_xl,
        lambda m, d, s: m(tiny.random(2, 4, s, s).to(d), TIMES[1], m.text, added_cond_kwargs=m.added),
    ),
    "encoder": (tiny.vae, lambda m, d, s: m.encode(tiny.random(2, 3, s, s).to(d)).latent_dist.parameters),
    "decoder": (tiny.vae, lambda m, d, s: m.decode(tiny.random(2, 4, s, s).to(d))),
    "ControlNetModel": (
        tiny.controlnet,
        lambda m, d, s: m(tiny.random(2, 4, s, s).to(d), TIMES[1], m.text, picture(2 * s, d), return_dict=False),
    ),
    "DiTTransformer2DModel": (
        tiny.dit,
        lambda m, d, s: m(tiny.random(2, 4, s, s).to(d), timestep=TIMES[1:2].expand(2), class_labels=m.labels),
    ),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def library(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    network = copy.deepcopy(KINDS[kind][0]()).to(dtype)
    # The same objects in each call, as in a run.
    vars(network).update(
        text=tiny.random(2, 5, tiny.WIDTH).to(dtype),
        added={"text_embeds": tiny.random(2, tiny.WIDTH).to(dtype), "time_ids": tiny.random(2, 6).to(dtype)},
        labels=torch.tensor([3, 5]),
    )
    return network


def accelerated(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    return fastdiff.accelerate(library(kind, dtype), strict=True, **options)


def warm(kind: str) -> nn.Module:
    """One that has been called, so that the next calls read the same tables of times and give the same to the bit."""
    network = accelerated(kind)
    for _ in range(2):
        results(kind, network)
    return network


def results(kind: str, network: nn.Module, dtype: torch.dtype = torch.float32, side: int = 16) -> list[Tensor]:
    return list(_flat(KINDS[kind][1](network, dtype, side)))


def _flat(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    else:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _flat(item)
