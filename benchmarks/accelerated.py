"""Whole networks: diffusers' own against the same network accelerated, and all rewrites against all but one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import fastdiff
from benchmarks.cases import Case
from benchmarks.count import count
from benchmarks.inputs import normal
from benchmarks.work import AUTOMATIC, Work
from fastdiff.models.rewrites import names

STEPS, INDEX = 50, 25
WITHOUT, NONE, ONLY = "without", "none", "only"
"""Contenders of a rewrite: all but it, no rewrite at all, and it alone."""


@dataclass(frozen=True)
class Network:
    """A class of diffusers with its configuration. text, classes: channels of the text and number of the classes that
    it reads, 0 for none. stepped: whether a call goes on to take the scheduler's step."""

    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    text: int = 0
    classes: int = 0
    stepped: bool = False


def _autoencoder(width: int, *, layers: int, groups: int) -> Network:
    sizes = (width, 2 * width, 4 * width, 4 * width)
    stages = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    shape = {"block_out_channels": sizes, "layers_per_block": layers, "norm_num_groups": groups}
    return Network("AutoencoderKL", {**shape, **stages})


_TINY = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}

NETWORKS = {
    "cifar": Network(
        "UNet2DModel",
        {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": None,
            "norm_eps": 1e-6,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
        },
    ),
    "sd15": Network("UNet2DConditionModel", {"cross_attention_dim": 768}, text=768),
    "decoder": _autoencoder(128, layers=2, groups=32),
    "small_unet": Network(
        "UNet2DConditionModel",
        {
            "block_out_channels": (64, 128, 128),
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "norm_num_groups": 8,
            "attention_head_dim": (2, 4, 4),
            "cross_attention_dim": 256,
        },
        text=256,
    ),
    "small_decoder": _autoencoder(32, layers=1, groups=8),
    "small_dit": Network(
        "DiTTransformer2DModel",
        {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 6, "sample_size": 16},
        classes=1000,
    ),
    "tiny_unet": Network("UNet2DModel", _TINY),
    "tiny_step": Network("UNet2DModel", _TINY, stepped=True),
}
"""cifar, sd15 and decoder are the networks of DDPM (Ho et al. 2020) and Stable Diffusion 1.5 as diffusers configures
them; the others are of their kinds, small enough for a call to take milliseconds."""


def build(case: Case, device: torch.device) -> Work:
    rewrite, _, name = case.variant.rpartition("-")
    dtype = getattr(torch, case.dtype)

    def call(change: Callable[[Any], Any]) -> Callable[[], Tensor]:
        return _call(name, case.shape, dtype, device, change)

    # First, while there are no copies of a large network beside the one in float64.
    truth, flops = _truth(name, case.shape)
    channels_last = call(_channels_last)
    if rewrite:
        chosen = {WITHOUT: [each for each in names() if each != rewrite], NONE: [], ONLY: [rewrite]}
        peers = {who: call(partial(fastdiff.accelerate, rewrites=rewrites)) for who, rewrites in chosen.items()}
    else:
        peers = {"diffusers": call(_as_it_is), "diffusers channels-last": channels_last}
    return Work(
        peers=peers,
        ours=call(fastdiff.accelerate),
        truth=truth,
        # Without weights that were laid out beforehand the convolutions are PyTorch's own, which are less exact
        # on a CPU in the layout that ours have.
        plain=channels_last() if rewrite else peers["diffusers"](),
        flops=flops,
        steps=1,
        backends=(AUTOMATIC,),
    )


@cache
def _truth(name: str, shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """The float64 result of diffusers' network, and the operations it took."""
    results: list[Tensor] = []
    call = _call(name, shape, torch.float64, torch.device("cpu"), _as_it_is)
    counted = count(lambda: results.append(call()))
    return results[0], counted.total.flops


@lru_cache(maxsize=1)
def _network(name: str) -> nn.Module:
    """Its weights are numbers that bfloat16 holds, so that one truth does for all dtypes."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    layout = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made: nn.Module = getattr(diffusers, layout.kind)(**layout.config)
    return made.eval().requires_grad_(False).bfloat16().float()


def _call(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, change: Callable[[Any], Any]
) -> Callable[[], Tensor]:
    """A call of a copy of the network. change: what happens to the network, or to the pipeline that it is in."""
    layout, samples = NETWORKS[name], shape[0]
    network: Any = copy.deepcopy(_network(name)).to(device, dtype)
    x = normal(*shape, seed=0, dtype=torch.bfloat16, device=device).to(dtype)
    if layout.kind == "AutoencoderKL":
        change(network)
        return lambda: network.decoder(x)
    scheduler: Any = None
    if layout.stepped:
        from diffusers import DDIMPipeline, DDIMScheduler

        scheduler = change(DDIMPipeline(network, DDIMScheduler(clip_sample=False))).scheduler
        scheduler.set_timesteps(STEPS, device=device)
        times = scheduler.timesteps
    else:
        change(network)
        times = torch.arange(0, 20 * STEPS, 20, device=device)
    given: dict[str, Tensor] = {}
    if layout.text:
        text = normal(samples, 77, layout.text, seed=1, dtype=torch.bfloat16, device=device)
        given["encoder_hidden_states"] = text.to(dtype)
    if layout.classes:
        given["class_labels"] = torch.arange(samples, device=device)

    def call() -> Tensor:
        t = times[INDEX]
        output: Tensor = network(x, t.expand(samples) if layout.classes else t, return_dict=False, **given)[0]
        return output if scheduler is None else scheduler.step(output, t, x, return_dict=False)[0]

    return call


def _as_it_is(target: Any) -> Any:
    return target


def _channels_last(target: Any) -> Any:
    return target.to(memory_format=torch.channels_last)
