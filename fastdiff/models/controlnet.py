"""ControlNet: a U-Net's way down that also sees a picture of what is wanted, and what it adds to the U-Net's maps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.errors import InputError
from fastdiff.models import config as configuration
from fastdiff.models.arena import in_arena
from fastdiff.models.attention import PROMPTS
from fastdiff.models.caches import Cache
from fastdiff.models.conditions import made_once
from fastdiff.models.context import Context
from fastdiff.models.maps import Map, convolved_onto, laid_out, total
from fastdiff.models.prepacked import apply, convolve
from fastdiff.models.stages import stored_maps
from fastdiff.models.times import TimeTables
from fastdiff.models.trunk import Trunk, as_bias

__all__ = ["ControlNet", "complete"]

LAYOUT = "ControlNetModel"

_DEFAULTS: dict[str, Any] = {
    "in_channels": 4,
    "conditioning_channels": 3,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "only_cross_attention": False,
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "attention_head_dim": 8,
    "num_attention_heads": None,
    "use_linear_projection": False,
    "class_embed_type": None,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "num_class_embeds": None,
    "upcast_attention": False,
    "resnet_time_scale_shift": "default",
    "projection_class_embeddings_input_dim": None,
    "controlnet_conditioning_channel_order": "rgb",
    "conditioning_embedding_out_channels": [16, 32, 96, 256],
    "global_pool_conditions": False,
    "addition_embed_type_num_heads": 64,
}

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "addition_embed_type": (None, "text", "text_time"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "controlnet_conditioning_channel_order": ("rgb", "bgr"),
}

_OWN = tuple(key for key in _DEFAULTS if key.startswith(("control", "conditioning_", "global_")))
"""Keys that a U-Net has not."""


def complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration, plain data that JSON can hold.

    Errors: InputError that names the key, its value, and what is supported.
    """
    layout = given.get("_class_name") or LAYOUT
    if layout != LAYOUT:
        raise InputError(f"ControlNet: _class_name={layout!r} is not supported; expected {LAYOUT!r}")
    config = configuration.merge("ControlNet", LAYOUT, _DEFAULTS, given)
    configuration.check_supported("ControlNet", config, _SUPPORTED)
    if not isinstance(config["layers_per_block"], int):
        raise InputError(f"ControlNet: layers_per_block={config['layers_per_block']!r}; expected a whole number")
    if not config["conditioning_embedding_out_channels"]:
        raise InputError("ControlNet: conditioning_embedding_out_channels is empty; expected one or more numbers")
    shared = configuration.complete(_of_unet(config))
    return {"_class_name": LAYOUT, **{key: shared.get(key, value) for key, value in config.items()}}


class ControlNet(Trunk):
    """ControlNet(**config)(sample, timestep, encoder_hidden_states, controlnet_cond) -> (residuals, middle residual).

    The configuration's keys, their defaults and the parameters' names are those of diffusers 0.42's ControlNetModel;
    `config` holds all of them. As there, what encoder_hid_dim asks for is not applied to the text.

    Errors: InputError for a key, value or combination that is not supported, named in the message.
    Source: Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", 2023, section 3.
    """

    def __init__(self, **config: Any) -> None:
        whole = complete(config)
        c = configuration.per_stage(configuration.complete(_of_unet(whole)))
        c.class_act_fn = "silu"
        if c.class_embed_type == "simple_projection":
            # The library's class does not know it, and has no class embedding then.
            c.class_embed_type = c.num_class_embeds = None
        super().__init__(whole, c)
        sizes = list(c.block_out_channels)
        self.controlnet_cond_embedding = ConditionEmbedding(
            whole["conditioning_channels"], whole["conditioning_embedding_out_channels"], sizes[0]
        )
        stored = [sizes[0]]
        for stage, size in zip(self.down_blocks, sizes, strict=True):
            stored += [size] * stored_maps(stage)  # type: ignore[arg-type]
        self.controlnet_down_blocks = nn.ModuleList(_zero(nn.Conv2d(size, size, 1)) for size in stored)
        self.controlnet_mid_block = _zero(nn.Conv2d(sizes[-1], sizes[-1], 1))
        self._conditions = Cache(PROMPTS)
        self._times = TimeTables(self)
        self._time_runs = self._times.runs

    @in_arena
    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor | None,
        controlnet_cond: Tensor,
        conditioning_scale: float | Tensor = 1.0,
        *,
        class_labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        guess_mode: bool = False,
    ) -> tuple[list[Tensor], Tensor]:
        """What a U-Net adds to its stored maps, in their order, and to its middle block's output.

        sample, timestep, encoder_hidden_states, class_labels, added_cond_kwargs: as a U-Net takes them.
        attention_mask: (N, keys), 1 = attend. controlnet_cond: (N, conditioning_channels, s H, s W) or one for all
        samples, with s = 2^(number of conditioning_embedding_out_channels - 1). All results are multiplied by
        conditioning_scale; in guess_mode also by 0.1 for the first map, growing geometrically to 1 for the middle. With
        global_pool_conditions each result is its mean over the map, (N, C, 1, 1), and guess_mode changes nothing.
        Results are channels-last where the rewrite of that name is on.
        """
        t = self._check_input(sample, timestep, encoder_hidden_states)
        context = Context(
            rewrites=self.rewrites,
            packs=self.packs.ready(sample, self.rewrites, self),
            tokens=encoder_hidden_states,
            mask=as_bias(attention_mask, sample),
        )
        self._read_time(context, timestep, t, class_labels, None, added_cond_kwargs or {}, sample.dtype)
        sample = laid_out(sample, self.rewrites)
        condition = self._condition(controlnet_cond, sample, context)
        x: Map
        if len(condition) == len(sample) and condition.dtype == sample.dtype:
            x = convolved_onto(condition, self.conv_in, sample, 1.0, context)
        else:
            x = convolve(self.conv_in, sample, context.packs) + condition
        x, skips = self._descend(x, context)
        layers = (*self.controlnet_down_blocks, self.controlnet_mid_block)
        stored = (total(each) for each in (*skips, x) if each is not None)
        maps = [apply(layer, each, context.packs) for layer, each in zip(layers, stored, strict=True)]
        maps = self._scaled(maps, conditioning_scale, guess_mode)
        if self.config["global_pool_conditions"]:
            maps = [each.mean(dim=(2, 3), keepdim=True) for each in maps]
        return maps[:-1], maps[-1]

    def fits(self, picture: Tensor, sample: Tensor) -> bool:
        """Whether controlnet_cond has the shape that goes with a sample's."""
        scale = 2**self.controlnet_cond_embedding.halvings
        return (
            picture.dim() == sample.dim() == 4
            and picture.shape[1] == self.config["conditioning_channels"]
            and len(picture) in (1, len(sample))
            and all(-(-of // scale) == size for of, size in zip(picture.shape[2:], sample.shape[2:], strict=True))
        )

    def _condition(self, picture: Tensor, sample: Tensor, context: Context) -> Tensor:
        if not self.fits(picture, sample):
            count, _, height, width = sample.shape
            scale, channels = 2**self.controlnet_cond_embedding.halvings, self.config["conditioning_channels"]
            raise InputError(
                f"ControlNet: controlnet_cond has shape {tuple(picture.shape)}; "
                f"expected {(count, channels, scale * height, scale * width)}"
            )
        layers, made = self.controlnet_cond_embedding, None

        def embed(context: Context) -> Tensor:
            x = picture.flip(1) if self.config["controlnet_conditioning_channel_order"] == "bgr" else picture
            return layers(laid_out(x, self.rewrites), context)

        if self.rewrites.text_cache:
            # Once for a run, it is not worth a copy of the weights.
            made = made_once(self._conditions, layers, [picture], lambda: embed(replace(context, packs=None)))
        return embed(context) if made is None else made

    def _scaled(self, maps: list[Tensor], scale: float | Tensor, guess_mode: bool) -> list[Tensor]:
        if guess_mode and not self.config["global_pool_conditions"]:
            scales = torch.logspace(-1, 0, len(maps), device=maps[0].device) * scale
            return [each * own for each, own in zip(maps, scales, strict=True)]
        if self.rewrites.unit_scale and not isinstance(scale, Tensor) and scale == 1:
            return maps
        return [each * scale for each in maps]


class ConditionEmbedding(nn.Module):
    """Convolutions with SiLU between them: (N, in_channels, H, W) -> (N, channels, H', W'), each side halved
    len(sizes) - 1 times.

    Source: Zhang et al. 2023, section 3.2.
    """

    def __init__(self, in_channels: int, sizes: list[int], channels: int) -> None:
        super().__init__()
        self.halvings = len(sizes) - 1
        self.conv_in = nn.Conv2d(in_channels, sizes[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for size, following in pairwise(sizes):
            self.blocks.append(nn.Conv2d(size, size, 3, padding=1))
            self.blocks.append(nn.Conv2d(size, following, 3, padding=1, stride=2))
        self.conv_out = _zero(nn.Conv2d(sizes[-1], channels, 3, padding=1))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        for layer in (self.conv_in, *self.blocks):
            x = F.silu(apply(layer, x, context.packs))
        return apply(self.conv_out, x, context.packs)


def _of_unet(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a U-Net with this way down; its way up is of no account."""
    shared = {key: value for key, value in config.items() if key not in _OWN and not key.startswith("_")}
    up = ["UpBlock2D"] * len(config["block_out_channels"])
    return {**shared, "_class_name": configuration.CONDITIONAL, "up_block_types": up}


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    """Weights and bias 0: at first a ControlNet changes nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
