"""The U-Net's configuration: the keys and defaults of diffusers' UNet2DModel and UNet2DConditionModel, checked."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from fastdiff.errors import InputError
from fastdiff.models.conditions import ADDED
from fastdiff.models.embeddings import ACTIVATIONS

PLAIN = "UNet2DModel"
CONDITIONAL = "UNet2DConditionModel"

_COMMON: dict[str, Any] = {
    "sample_size": None,
    "center_input_sample": False,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "layers_per_block": 2,
    "downsample_padding": 1,
    "mid_block_scale_factor": 1.0,
    "dropout": 0.0,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "norm_eps": 1e-5,
    "attention_head_dim": 8,
    "class_embed_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_type": "positional",
    "time_embedding_dim": None,
}

_DEFAULTS: dict[str, dict[str, Any]] = {
    PLAIN: {
        **_COMMON,
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "block_out_channels": [224, 448, 672, 896],
        "downsample_type": "conv",
        "upsample_type": "conv",
        "attn_norm_num_groups": None,
        "add_attention": True,
        "num_train_timesteps": None,
    },
    CONDITIONAL: {
        **_COMMON,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        "block_out_channels": [320, 640, 1280, 1280],
        "only_cross_attention": False,
        "mid_block_only_cross_attention": None,
        "cross_attention_dim": 1280,
        "cross_attention_norm": None,
        "dual_cross_attention": False,
        "attention_type": "default",
        "upcast_attention": False,
        "num_attention_heads": None,
        "transformer_layers_per_block": 1,
        "reverse_transformer_layers_per_block": None,
        "use_linear_projection": False,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "addition_embed_type": None,
        "addition_embed_type_num_heads": 64,
        "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None,
        "class_embeddings_concat": False,
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
    },
}

_PLAIN_KINDS = ("", "Attn", "Skip", "AttnSkip", "K")
_CROSSED_KINDS = ("CrossAttn", "SimpleCrossAttn", "KCrossAttn", "", "Attn", "K")

_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "act_fn": tuple(ACTIVATIONS),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "cross_attention_norm": (None, "layer_norm", "group_norm"),
    "attention_type": ("default", "gated", "gated-text-image"),
    "encoder_hid_dim_type": (None, "text_proj", "text_image_proj", "image_proj"),
    "addition_embed_type": tuple(ADDED),
    "time_embedding_act_fn": (None, *ACTIVATIONS),
    "timestep_post_act": (None, *ACTIVATIONS),
}

SUPPORTED_OF: dict[str, dict[str, tuple[Any, ...]]] = {
    PLAIN: {
        "down_block_types": (*tuple(f"{kind}DownBlock2D" for kind in _PLAIN_KINDS), "ResnetDownsampleBlock2D"),
        "mid_block_type": ("UNetMidBlock2D", None),
        "up_block_types": (*tuple(f"{kind}UpBlock2D" for kind in _PLAIN_KINDS), "ResnetUpsampleBlock2D"),
        "class_embed_type": (None, "timestep", "identity"),
        "time_embedding_type": ("positional", "fourier", "learned"),
    },
    CONDITIONAL: {
        "down_block_types": (*tuple(f"{kind}DownBlock2D" for kind in _CROSSED_KINDS), "ResnetDownsampleBlock2D"),
        "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D", None),
        "up_block_types": (*tuple(f"{kind}UpBlock2D" for kind in _CROSSED_KINDS), "ResnetUpsampleBlock2D"),
        "class_embed_type": (None, "timestep", "identity", "projection", "simple_projection"),
        "time_embedding_type": ("positional", "fourier"),
    },
}

_PER_STAGE = (
    "layers_per_block",
    "attention_head_dim",
    "num_attention_heads",
    "cross_attention_dim",
    "only_cross_attention",
    "transformer_layers_per_block",
)

_DUAL = ("CrossAttn", "UNetMidBlock2DCrossAttn")
"""Blocks that dual_cross_attention changes."""

_NEEDS: dict[str, dict[str, str]] = {
    "class_embed_type": {
        "projection": "projection_class_embeddings_input_dim",
        "simple_projection": "projection_class_embeddings_input_dim",
    },
    "encoder_hid_dim_type": dict.fromkeys(("text_proj", "text_image_proj", "image_proj"), "encoder_hid_dim"),
    "time_embedding_type": {"learned": "num_train_timesteps"},
}


def complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration, plain data that JSON can hold; `_class_name` says which of the two layouts it is.

    Without `_class_name` the layout is UNet2DConditionModel exactly if a key or block of cross-attention is present.
    Errors: InputError that names the key, its value, and what is supported.
    """
    layout = given.get("_class_name") or _guess(given)
    if layout not in _DEFAULTS:
        raise InputError(f"UNet: _class_name={layout!r} is not supported; expected {PLAIN!r} or {CONDITIONAL!r}")
    config = merge("UNet", layout, _DEFAULTS[layout], given)
    for key in ("down_block_types", "up_block_types"):
        # Early configurations call the blocks UNetResDownBlock2D and so on.
        config[key] = [kind.removeprefix("UNetRes") for kind in config[key]]
    if layout == CONDITIONAL and config["encoder_hid_dim"] is not None:
        config["encoder_hid_dim_type"] = config["encoder_hid_dim_type"] or "text_proj"
    _check_values(config, layout)
    _check_lengths(config)
    return {"_class_name": layout, **config}


def merge(network: str, layout: str, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults with what is given in their place, as plain data; keys that begin with "_" are left out.

    Errors: InputError for a key that is not among the defaults.
    """
    known = {key: value for key, value in given.items() if not key.startswith("_")}
    for key in known:
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{network}: {key}={known[key]!r} is not a configuration key of {layout}{hint}")
    return {key: _plain(value) for key, value in {**defaults, **known}.items()}


def check_supported(network: str, config: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]]) -> None:
    """Errors: InputError for a value, or an entry of a list `..._types`, that is not among those supported."""
    for key, values in supported.items():
        if key not in config:
            continue
        for value in config[key] if key.endswith("_types") else [config[key]]:
            if value not in values:
                names = ", ".join(repr(item) for item in values)
                raise InputError(f"{network}: {key}={value!r} is not supported; expected one of {names}")


def check_groups(network: str, config: Mapping[str, Any]) -> None:
    """Errors: InputError if a stage's channels are not whole groups."""
    groups = config["norm_num_groups"]
    kinds = (*config["down_block_types"], *config["up_block_types"])
    if groups is None and kinds and all(kind.startswith("K") or "Skip" in kind for kind in kinds):
        return
    for channels in config["block_out_channels"]:
        if not isinstance(groups, int) or groups < 1 or channels % groups:
            raise InputError(f"{network}: block_out_channels={channels} is not divisible by norm_num_groups={groups}")


def per_stage(config: Mapping[str, Any]) -> SimpleNamespace:
    """The configuration as attributes, with one entry per stage where a single value stands for all stages.

    A key that only the other layout has takes its default there, which leaves the thing out.
    """
    c = SimpleNamespace(**{**_DEFAULTS[PLAIN], **_DEFAULTS[CONDITIONAL], **config})
    c.conditional = config["_class_name"] == CONDITIONAL
    # What the library calls attention_head_dim is, in its cross-attention blocks, the number of heads.
    c.num_attention_heads = c.attention_head_dim if c.num_attention_heads is None else c.num_attention_heads
    for key in _PER_STAGE:
        setattr(c, key, spread(getattr(c, key), len(c.block_out_channels)))
    if c.mid_block_only_cross_attention is None:
        c.mid_block_only_cross_attention = config.get("only_cross_attention") is True
    c.class_act_fn = c.act_fn if c.conditional else "silu"
    c.crossed = any("CrossAttn" in str(kind) for kind in (c.mid_block_type, *c.down_block_types, *c.up_block_types))
    return c


def spread(value: Any, count: int) -> list[Any]:
    """A list as it is; anything else `count` times."""
    return value if isinstance(value, list) else [value] * count


def _guess(given: Mapping[str, Any]) -> str:
    blocks = [*given.get("down_block_types", ()), *given.get("up_block_types", ()), given.get("mid_block_type")]
    crossed = "cross_attention_dim" in given or any("CrossAttn" in str(block) for block in blocks)
    return CONDITIONAL if crossed else PLAIN


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _check_values(config: Mapping[str, Any], layout: str) -> None:
    check_supported("UNet", config, {**_SUPPORTED, **SUPPORTED_OF[layout]})
    for key, needs in _NEEDS.items():
        other = needs.get(config.get(key))  # type: ignore[arg-type]
        if other is not None and config[other] is None:
            raise InputError(f"UNet: {key}={config[key]!r} needs {other}, which is None")
    kind = config.get("addition_embed_type")
    needed: dict[str, tuple[str, ...]] = {
        "text_time": ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    }
    needed |= dict.fromkeys(("image", "image_hint"), ("encoder_hid_dim",))
    for other in needed.get(kind, ()):  # type: ignore[arg-type]
        if config[other] is None:
            raise InputError(f"UNet: addition_embed_type={kind!r} needs {other}, which is None")
    blocks = (config["mid_block_type"], *config["down_block_types"], *config["up_block_types"])
    if config.get("dual_cross_attention") and any(str(block).startswith(_DUAL) for block in blocks):
        raise InputError("UNet: dual_cross_attention=True is not supported; expected False")


def _check_lengths(config: Mapping[str, Any]) -> None:
    stages = len(config["block_out_channels"])
    for key in ("down_block_types", "up_block_types", "reverse_transformer_layers_per_block", *_PER_STAGE):
        value = config.get(key)
        if isinstance(value, list) and len(value) != stages:
            raise InputError(
                f"UNet: {key} has {len(value)} entries; expected {stages}, one for each of block_out_channels"
            )
    padding = config["downsample_padding"]
    if not isinstance(padding, int) or padding < 0:
        raise InputError(f"UNet: downsample_padding={padding!r}; expected a whole number, 0 or more")
    check_groups("UNet", config)
