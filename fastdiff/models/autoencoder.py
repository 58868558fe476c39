"""The autoencoder of latent diffusion: an encoder from pictures to latents, and a decoder back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import InputError
from fastdiff.models import config as configuration
from fastdiff.models.arena import in_arena
from fastdiff.models.attention import SpatialAttention
from fastdiff.models.blocks import Downsample, MidStage, ResnetBlock, ResnetSettings, Upsample
from fastdiff.models.context import Context
from fastdiff.models.maps import Map, laid_out, normed
from fastdiff.models.packs import Packs
from fastdiff.models.prepacked import apply, convolve
from fastdiff.models.rewrites import Rewrites
from fastdiff.nn import GroupNormSiLU
from fastdiff.ops.reference import memory_format

__all__ = ["AutoencoderKL", "Decoder", "Encoder", "complete"]

LAYOUT = "AutoencoderKL"

_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "block_out_channels": [64],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "force_upcast": True,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D"),
}

_EPS = 1e-6
"""Of every norm; the configuration has no key for it."""


def complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration, plain data that JSON can hold.

    Errors: InputError that names the key, its value, and what is supported.
    """
    layout = given.get("_class_name") or LAYOUT
    if layout != LAYOUT:
        raise InputError(f"AutoencoderKL: _class_name={layout!r} is not supported; expected {LAYOUT!r}")
    config = configuration.merge(LAYOUT, LAYOUT, _DEFAULTS, given)
    configuration.check_supported(LAYOUT, config, _SUPPORTED)
    for key in ("in_channels", "out_channels", "latent_channels", "layers_per_block"):
        if not isinstance(config[key], int) or config[key] < 1:
            raise InputError(f"AutoencoderKL: {key}={config[key]!r}; expected a whole number from 1")
    stages = len(config["block_out_channels"])
    for key in ("down_block_types", "up_block_types"):
        if len(config[key]) != stages:
            raise InputError(
                f"AutoencoderKL: {key} has {len(config[key])} entries; expected {stages}, one for each of "
                "block_out_channels"
            )
    configuration.check_groups(LAYOUT, config)
    return {"_class_name": LAYOUT, **config}


class _Coder(nn.Module):
    """conv_out(silu(group_norm(stages(conv_in(x))))), which the encoder and the decoder are.

    `rewrites` says how it is computed, not what.
    """

    def __init__(self, channels: tuple[int, int, int, int], groups: int) -> None:
        super().__init__()
        self.rewrites = Rewrites()
        self.packs = Packs()
        taken, first, last, given = channels
        self.conv_in = nn.Conv2d(taken, first, 3, padding=1)
        self.conv_norm_out = GroupNormSiLU(groups, last, eps=_EPS)
        self.conv_out = nn.Conv2d(last, given, 3, padding=1)
        self.in_channels = taken

    def stages(self) -> Iterable[nn.Module]:
        """What lies between the first convolution and the last norm, in turn."""
        raise NotImplementedError

    @in_arena
    def forward(self, sample: Tensor) -> Tensor:
        _check(type(self).__name__, sample, self.in_channels)
        context = Context(rewrites=self.rewrites, packs=self.packs.ready(sample, self.rewrites, self))
        layout = memory_format(sample)
        x: Map = convolve(self.conv_in, laid_out(sample, self.rewrites), context.packs)
        for stage in self.stages():
            x = stage(x, context)
        out = convolve(self.conv_out, normed(self.conv_norm_out, x, context, keep=False), context.packs)
        return out.contiguous(memory_format=layout) if self.rewrites.channels_last else out


class Encoder(_Coder):
    """Encoder(config)(pictures): (N, in_channels, H, W) -> (N, 2 * latent_channels, H', W'), means and log-variances.

    Every stage but the last halves the map, rounding down. `config` is that of `complete`; the parameters' names are
    those of diffusers' `AutoencoderKL.encoder`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        channels = config["block_out_channels"]
        ends = (config["in_channels"], channels[0], channels[-1], 2 * config["latent_channels"])
        super().__init__(ends, config["norm_num_groups"])
        self.down_blocks = nn.ModuleList(
            _Stage(
                config,
                kind,
                layers=config["layers_per_block"],
                in_channels=channels[max(stage - 1, 0)],
                out_channels=channels[stage],
                resample=None if stage == len(channels) - 1 else "down",
            )
            for stage, kind in enumerate(config["down_block_types"])
        )
        self.mid_block = _mid_stage(config)

    def stages(self) -> Iterable[nn.Module]:
        return (*self.down_blocks, self.mid_block)


class Decoder(_Coder):
    """Decoder(config)(latents): (N, latent_channels, H, W) -> pictures (N, out_channels, s H, s W).

    s = 2^(stages - 1). `config` is that of `complete`; the parameters' names are those of diffusers'
    `AutoencoderKL.decoder`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        channels = config["block_out_channels"][::-1]
        ends = (config["latent_channels"], channels[0], channels[-1], config["out_channels"])
        super().__init__(ends, config["norm_num_groups"])
        self.mid_block = _mid_stage(config)
        self.up_blocks = nn.ModuleList(
            _Stage(
                config,
                kind,
                layers=config["layers_per_block"] + 1,
                in_channels=channels[max(stage - 1, 0)],
                out_channels=channels[stage],
                resample=None if stage == len(channels) - 1 else "up",
            )
            for stage, kind in enumerate(config["up_block_types"])
        )

    def stages(self) -> Iterable[nn.Module]:
        return (self.mid_block, *self.up_blocks)


class AutoencoderKL(nn.Module):
    """AutoencoderKL(**config): `encode` pictures to latents, `decode` latents to pictures.

    The configuration's keys, their defaults and the parameters' names are those of diffusers 0.42; `config` holds all
    of them. Latents are those of the network itself: what a diffusion model works on is (latents - shift_factor) *
    scaling_factor. To train it, call it inside `fastdiff.use_backend("reference")`.

    Errors: InputError for a key, value or combination that is not supported, named in the message.
    Source: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022, appendix G.
    """

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = c = complete(config)
        latent = c["latent_channels"]
        self.encoder = Encoder(c)
        self.decoder = Decoder(c)
        self.quant_conv = nn.Conv2d(2 * latent, 2 * latent, 1) if c["use_quant_conv"] else None
        self.post_quant_conv = nn.Conv2d(latent, latent, 1) if c["use_post_quant_conv"] else None

    @property
    def rewrites(self) -> Rewrites:
        """How both ways are computed."""
        return self.encoder.rewrites

    @rewrites.setter
    def rewrites(self, rewrites: Rewrites) -> None:
        self.encoder.rewrites = self.decoder.rewrites = rewrites

    def encode(self, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents, (N, latent_channels, H', W') each; sample (N, in_channels, H, W).

        A latent is mean + deviation * noise. The log-variance is held to [-30, 20], as in the original.
        """
        moments = self.encoder(sample)
        if self.quant_conv is not None:
            moments = _convolved(self.quant_conv, moments, self.encoder)
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (N, out_channels, s H, s W) of latents (N, latent_channels, H, W); s = 2^(stages - 1)."""
        if self.post_quant_conv is not None:
            _check("AutoencoderKL.decode", latents, self.post_quant_conv.in_channels)
            latents = _convolved(self.post_quant_conv, latents, self.decoder)
        return self.decoder(latents)

    def forward(self, sample: Tensor) -> Tensor:
        """The picture that the mean of the sample's latents stands for."""
        return self.decode(self.encode(sample)[0])


class _Stage(nn.Module):
    """One resolution: residual blocks, each followed by attention if the kind has it, then the step to the next."""

    def __init__(
        self,
        config: Mapping[str, Any],
        kind: str,
        *,
        layers: int,
        in_channels: int,
        out_channels: int,
        resample: str | None,
    ) -> None:
        super().__init__()
        inputs = [in_channels, *[out_channels] * (layers - 1)]
        self.resnets = nn.ModuleList(ResnetBlock(size, out_channels, _settings(config)) for size in inputs)
        attentions = [_attention(config, out_channels) for _ in inputs] if kind.startswith("Attn") else []
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([Downsample(out_channels, padding=0)] if resample == "down" else [])
        self.upsamplers = nn.ModuleList([Upsample(out_channels)] if resample == "up" else [])

    def forward(self, x: Map, context: Context) -> Map:
        for index, resnet in enumerate(self.resnets):
            x = resnet(x, context)
            if self.attentions:
                x = self.attentions[index](x, context)
        for step in (*self.downsamplers, *self.upsamplers):
            x = step(x, context)
        return x


def _mid_stage(config: Mapping[str, Any]) -> MidStage:
    channels = config["block_out_channels"][-1]
    attentions = [_attention(config, channels)] if config["mid_block_add_attention"] else []
    return MidStage((ResnetBlock(channels, channels, _settings(config)) for _ in range(2)), attentions)


def _settings(config: Mapping[str, Any]) -> ResnetSettings:
    return ResnetSettings(
        time_channels=None, groups=config["norm_num_groups"], eps=_EPS, dropout=0.0, scale_shift=False
    )


def _attention(config: Mapping[str, Any], channels: int) -> SpatialAttention:
    return SpatialAttention(channels, head_dim=channels, groups=config["norm_num_groups"], eps=_EPS)


def _convolved(layer: nn.Module, x: Tensor, beside: _Coder) -> Tensor:
    """layer(x) in x's layout, for a convolution that comes before or after a coder."""
    packs, layout = beside.packs.ready(x, beside.rewrites, beside), memory_format(x)
    if packs is not None:
        x = laid_out(x, beside.rewrites)
    return apply(layer, x, packs).contiguous(memory_format=layout)


def _check(name: str, sample: Tensor, channels: int) -> None:
    if sample.dim() != 4 or sample.shape[1] != channels:
        raise InputError(f"{name}: the input has shape {tuple(sample.shape)}; expected (N, {channels}, H, W)")
