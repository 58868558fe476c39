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
from benchmarks import cases, compilers
from benchmarks.cases import Case
from benchmarks.count import count
from benchmarks.inputs import normal
from benchmarks.work import AUTOMATIC, FirstTimed, Work
from fastdiff import profiling
from fastdiff.models.rewrites import names, needed

STEPS, INDEX = 50, 25
LARGE = 2**31
"""Bytes of weights, of which memory has no room for one copy more: diffusers in one memory format has to do."""
WITHOUT, NONE, ONLY = "without", "none", "only"
"""Contenders of a rewrite: all but it, none but those that it needs, and it beside those."""


@dataclass(frozen=True)
class Network:
    """A class of diffusers with its configuration. text, classes: channels of the text and number of the classes that
    it reads, 0 for none. stepped: whether a call goes on to take the scheduler's step."""

    kind: str
    config: Mapping[str, Any] = field(default_factory=dict)
    text: int = 0
    classes: int = 0
    stepped: bool = False


_TINY = {
    "sample_size": 16,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}

NETWORKS = {
    **{name: Network(each.kind, each.config, text=each.text) for name, each in profiling.NETWORKS.items()},
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
    "small_decoder": Network(
        "AutoencoderKL",
        {
            **profiling.NETWORKS["decoder"].config,
            "block_out_channels": (32, 64, 128, 128),
            "layers_per_block": 1,
            "norm_num_groups": 8,
        },
    ),
    "small_dit": Network(
        "DiTTransformer2DModel",
        {"num_attention_heads": 6, "attention_head_dim": 64, "num_layers": 6, "sample_size": 16},
        classes=1000,
    ),
    "tiny_unet": Network("UNet2DModel", _TINY),
    "tiny_step": Network("UNet2DModel", _TINY, stepped=True),
}
"""Those that `fastdiff profile` knows by name; the others are of their kinds, small enough for a call to take
milliseconds."""


def build(case: Case, device: torch.device) -> Work:
    rewrite, _, name = case.variant.rpartition("-")
    dtype = getattr(torch, case.dtype)

    def call(change: Callable[[Any], Any], dtype: torch.dtype = dtype) -> Callable[[], Tensor]:
        return _call(name, case.shape, dtype, device, change)

    # First, while there are no copies of a large network beside the one in float64.
    truth, flops = _truth(name, case.shape)
    if rewrite:
        beside = needed(rewrite)
        chosen = {WITHOUT: {*names()} - {rewrite}, NONE: beside, ONLY: (*beside, rewrite)}
        peers = {who: call(partial(fastdiff.accelerate, rewrites=rewrites)) for who, rewrites in chosen.items()}
    elif case.operator == "compiled":
        frozen = {compilers.FROZEN: True} if (name, case.dtype) in cases.FROZEN else {}
        modes = {compilers.COMPILED: False, **frozen}
        peers = {who: call(partial(compilers.compiled, freezing=freezing)) for who, freezing in modes.items()}
    else:
        peers = {"diffusers": call(_as_it_is)}
        if sum(each.numel() for each in _network(name).parameters()) * dtype.itemsize < LARGE:
            peers["diffusers channels-last"] = call(_channels_last)
        if dtype != torch.float32:
            peers["diffusers float32"] = call(_as_it_is, torch.float32)
        if device.type == "cpu" and compilers.has_openvino():
            peers["openvino"] = _in_openvino(name, case.shape, dtype)
    # Without weights that were laid out beforehand the convolutions are PyTorch's own, which are less exact on a CPU
    # in the layout that ours have.
    plain = peers["diffusers"] if "diffusers" in peers else call(_channels_last if rewrite else _as_it_is)
    return Work(
        peers=peers,
        ours=call(fastdiff.accelerate),
        truth=truth,
        plain=plain(),
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
) -> FirstTimed:
    """A call of the network, or of a copy. change: what happens to the network, or to the pipeline that it is in, at
    the first call."""
    layout, base = NETWORKS[name], _network(name)
    # Those that nothing changes are one, as large ones have no room for more.
    same = change is _as_it_is and base.dtype == dtype and device.type == "cpu"  # type: ignore[comparison-overlap]
    network: Any = base if same else copy.deepcopy(base).to(device, dtype)
    x, times, given = inputs(layout, shape, dtype, device)
    scheduler: Any = None
    changed: Any = None
    if layout.stepped:
        from diffusers import DDIMPipeline, DDIMScheduler

        network = DDIMPipeline(network, DDIMScheduler(clip_sample=False))

    def call() -> Tensor:
        nonlocal changed, scheduler, times
        if changed is None:
            changed = change(network)
            if layout.stepped:
                changed, scheduler = changed.unet, changed.scheduler
                scheduler.set_timesteps(STEPS, device=device)
                times = scheduler.timesteps
        if layout.kind == "AutoencoderKL":
            return changed.decoder(x)
        t = times[INDEX]
        output: Tensor = changed(x, t.expand(len(x)) if layout.classes else t, return_dict=False, **given)[0]
        return output if scheduler is None else scheduler.step(output, t, x, return_dict=False)[0]

    return FirstTimed(call)


def inputs(
    layout: Network, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """x, the times of a run, and what the network is called with besides; the same numbers in every dtype."""
    x = normal(*shape, seed=0, dtype=torch.bfloat16, device=device).to(dtype)
    given: dict[str, Tensor] = {}
    if layout.text:
        text = normal(shape[0], 77, layout.text, seed=1, dtype=torch.bfloat16, device=device)
        given["encoder_hidden_states"] = text.to(dtype)
    if layout.classes:
        given["class_labels"] = torch.arange(shape[0], device=device)
    return x, torch.arange(0, 20 * STEPS, 20, device=device), given


def _in_openvino(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> FirstTimed:
    """OpenVINO takes float32 and is told what to compute in."""
    layout, network = NETWORKS[name], _network(name)
    x, times, given = inputs(layout, shape, torch.float32, torch.device("cpu"))
    if layout.kind == "AutoencoderKL":
        return FirstTimed(compilers.openvino(network.decoder, (x,), (), dtype))
    return FirstTimed(compilers.openvino(network, (x, times[INDEX], *given.values()), tuple(given), dtype))


def _as_it_is(target: Any) -> Any:
    return target


def _channels_last(target: Any) -> Any:
    return target.to(memory_format=torch.channels_last)
