"""Small networks of diffusers drawn at random from all that their constructors and calls take."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from random_calls import add_classes, add_mask, conditional_call, drawn_residuals, plain_call
from random_draws import ACTIVATIONS, TEXT, Config, Dice, Drawn
from torch import Tensor


def draw(seed: int) -> Drawn:
    """The layout of that number."""
    dice = Dice(seed)
    make = dice.choices([make for make, _ in FAMILIES], [weight for _, weight in FAMILIES])[0]
    drawn = make(dice, seed)
    masks = Dice(1000 + seed)
    if "only_cross_attention" in drawn.config and masks.chance(0.6):
        add_mask(masks, drawn.config, drawn.arguments)
    residuals = drawn_residuals(dice, drawn) if drawn.kind is UNet2DConditionModel and dice.chance(0.4) else {}
    arguments = {**drawn.arguments, **residuals, "return_dict": dice.chance(0.5)}
    return replace(drawn, arguments=cast(arguments, drawn.dtype))


def cast(arguments: Any, dtype: torch.dtype) -> Any:
    """The arguments with all that has a fraction in that dtype, but for the time."""
    if isinstance(arguments, dict):
        return {name: value if name == "timestep" else cast(value, dtype) for name, value in arguments.items()}
    if isinstance(arguments, list | tuple):
        return type(arguments)(cast(value, dtype) for value in arguments)
    return arguments.to(dtype) if isinstance(arguments, Tensor) and arguments.is_floating_point() else arguments


def again(drawn: Drawn) -> list[Config]:
    """Other arguments for the same network: another time, another picture and text, and the first ones once more."""
    dice, first = Dice(drawn.seed), drawn.arguments
    whole = drawn.config.get("time_embedding_type") == "learned"
    later = {**first, "timestep": dice.time(len(first["sample"]), whole=whole)}
    other = {**later, "sample": dice.normal(*first["sample"].shape)}
    text = first.get("encoder_hidden_states")
    if text is not None:
        other["encoder_hidden_states"] = dice.normal(*text.shape)
    return [cast(call, drawn.dtype) for call in (later, other, first)]


def _shared(dice: Dice, stages: int) -> Config:
    """What all three classes have."""
    groups = dice.one(1, 2, 3, 4, 5)
    return {
        "norm_num_groups": groups,
        "block_out_channels": [groups * 2 * dice.randint(1, 3) for _ in range(stages)],
        "norm_eps": dice.one(1e-5, 1e-6, 1e-3),
        "act_fn": dice.choice(ACTIVATIONS),
        "flip_sin_to_cos": dice.chance(0.5),
        "freq_shift": dice.one(0, 0, 1) if groups > 2 else 0,
        "resnet_time_scale_shift": dice.one("default", "default", "scale_shift"),
        "downsample_padding": dice.one(1, 1, 0),
        "mid_block_scale_factor": dice.one(1, 1, 1.5),
        "layers_per_block": dice.randint(1, 2),
        "in_channels": dice.randint(1, 5),
    }


def _even(dice: Dice, stages: int, least: int = 1) -> tuple[int, int]:
    """Sides that can be halved as often as the network does, to no less than that."""
    step = 2 ** (stages - 1)
    return step * dice.randint(least, 3), step * dice.randint(least, 3)


def _plain(dice: Dice, seed: int) -> Drawn:
    stages = dice.randint(1, 3)
    down, up = (
        ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        (
            "UpBlock2D",
            "AttnUpBlock2D",
            "ResnetUpsampleBlock2D",
        ),
    )
    config = {
        **_shared(dice, stages),
        "out_channels": dice.randint(1, 4),
        "down_block_types": [dice.choice(down) for _ in range(stages)],
        "up_block_types": [dice.choice(up) for _ in range(stages)],
        "mid_block_type": dice.one("UNetMidBlock2D", "UNetMidBlock2D", None),
        "downsample_type": dice.one("conv", "resnet"),
        "upsample_type": dice.one("conv", "resnet"),
        "attention_head_dim": dice.one(1, 2, None),
        "add_attention": dice.chance(0.8),
        "attn_norm_num_groups": dice.one(None, None, 1),
        "center_input_sample": dice.chance(0.3),
        "dropout": dice.one(0.0, 0.1),
    }
    return plain_call(dice, seed, config, _even(dice, stages))


def _skips(dice: Dice, seed: int) -> Drawn:
    """NCSN++: the picture itself goes down and up beside the maps."""
    stages = dice.randint(1, 3)
    config = {
        **_shared(dice, stages),
        "in_channels": 3,
        "out_channels": 3,
        "norm_num_groups": dice.one(4, 8, None),
        "block_out_channels": [32 * dice.randint(1, 2) for _ in range(stages)],
        "down_block_types": [dice.one("SkipDownBlock2D", "AttnSkipDownBlock2D") for _ in range(stages)],
        "up_block_types": [dice.one("SkipUpBlock2D", "AttnSkipUpBlock2D") for _ in range(stages)],
        "mid_block_scale_factor": dice.one(1, 2**0.5),
        "attention_head_dim": dice.one(8, 16, None),
    }
    return plain_call(dice, seed, config, _even(dice, stages))


def _crossed(dice: Dice, seed: int) -> Drawn:
    """Latent diffusion: every kind of block that may stand beside cross-attention."""
    stages = dice.randint(1, 3)
    down = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
    up = ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
    config = {
        **_shared(dice, stages),
        **_conditional(dice, stages),
        "down_block_types": [dice.choice(down) for _ in range(stages)],
        "up_block_types": [dice.choice(up) for _ in range(stages)],
        "mid_block_type": dice.one("UNetMidBlock2DCrossAttn", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
        "attention_head_dim": dice.per_stage(stages, 1, 2),
        "only_cross_attention": dice.per_stage(stages, False, False, True),
        "transformer_layers_per_block": dice.per_stage(stages, 1, 1, 2, 3, 4),
        "use_linear_projection": dice.chance(0.5),
        "upcast_attention": dice.chance(0.3),
        "attention_type": dice.one("default", "default", "default", "gated", "gated-text-image"),
    }
    if dice.chance(0.2):
        config["reverse_transformer_layers_per_block"] = [dice.randint(1, 3) for _ in range(stages)]
    easy = {"AttnUpBlock2D", "ResnetUpsampleBlock2D"}.isdisjoint(config["up_block_types"])
    return conditional_call(dice, seed, config, dice.sides() if easy else _even(dice, stages))


def _simple(dice: Dice, seed: int) -> Drawn:
    """Text and pixels in one attention: unCLIP, Kandinsky, DeepFloyd."""
    stages = dice.randint(1, 3)
    down = ("SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D")
    up = ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")
    config = {
        **_shared(dice, stages),
        **_conditional(dice, stages),
        "down_block_types": [dice.choice(down) for _ in range(stages)],
        "up_block_types": [dice.choice(up) for _ in range(stages)],
        "mid_block_type": dice.one("UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2DSimpleCrossAttn", "UNetMidBlock2D"),
        "attention_head_dim": dice.per_stage(stages, 1, 2),
        "only_cross_attention": dice.per_stage(stages, False, False, True),
        "mid_block_only_cross_attention": dice.one(None, None, False, True),
        "cross_attention_norm": dice.one(None, None, "group_norm", "layer_norm"),
        "resnet_skip_time_act": dice.chance(0.4),
    }
    if config["cross_attention_norm"] == "group_norm":
        config["cross_attention_dim"] = 32
    elif config["cross_attention_norm"] == "layer_norm":
        # The library gives this norm the channels of the map.
        config |= {"norm_num_groups": dice.one(1, 2, 3, 4), "block_out_channels": [TEXT] * stages}
    drawn = conditional_call(dice, seed, config, _even(dice, stages))
    if config["mid_block_only_cross_attention"] or config["only_cross_attention"] is not False:
        # The library makes the mask as long as text and pixels.
        drawn.arguments.pop("encoder_attention_mask", None)
    return drawn


def _k_blocks(dice: Dice, seed: int) -> Drawn:
    """The latent upscaler: norms that are scaled and shifted by the time before each convolution."""
    stages = dice.randint(2, 3)
    channels = [32 * dice.randint(1, 2) for _ in range(stages)]
    crossed = dice.randint(0, stages)
    if crossed:
        # The library knows the lowest stage, which has no stored map, by these sizes.
        channels[-2] = channels[-1]
    config = {
        **_shared(dice, stages),
        **_conditional(dice, stages),
        "norm_num_groups": dice.one(None, None, 4),
        "block_out_channels": channels,
        "down_block_types": ["KDownBlock2D"] * (stages - crossed) + ["KCrossAttnDownBlock2D"] * crossed,
        "up_block_types": ["KCrossAttnUpBlock2D"] * crossed + ["KUpBlock2D"] * (stages - crossed),
        "mid_block_type": None,
        "layers_per_block": dice.randint(2, 3),
        "attention_head_dim": dice.one(8, 16),
        "time_embedding_dim": channels[-1],
    }
    return conditional_call(dice, seed, config, _even(dice, stages, 2))


def _conditional(dice: Dice, stages: int) -> Config:
    """What only UNet2DConditionModel has, whatever its blocks."""
    return {
        "out_channels": dice.randint(1, 4),
        "layers_per_block": dice.per_stage(stages, 1, 1, 2),
        "center_input_sample": dice.chance(0.2),
        "cross_attention_dim": TEXT,
        "resnet_out_scale_factor": dice.one(1.0, 1.0, 1.3),
        "time_embedding_type": dice.one("positional", "positional", "fourier"),
        "time_embedding_dim": dice.one(None, None, 20),
        "time_embedding_act_fn": dice.one(None, None, "gelu", "silu", "mish"),
        "timestep_post_act": dice.one(None, None, "gelu", "silu", "mish"),
        "conv_in_kernel": dice.one(3, 3, 1, 5),
        "conv_out_kernel": dice.one(3, 3, 1, 5),
        "dropout": dice.one(0.0, 0.0, 0.1),
    }


def _controlnet(dice: Dice, seed: int) -> Drawn:
    stages = dice.randint(1, 3)
    down = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
    halvings = dice.randint(0, 2)
    config = {
        **_shared(dice, stages),
        "conditioning_channels": dice.randint(1, 4),
        "cross_attention_dim": TEXT,
        "down_block_types": [dice.choice(down) for _ in range(stages)],
        "mid_block_type": dice.one("UNetMidBlock2DCrossAttn", "UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
        "attention_head_dim": dice.per_stage(stages, 1, 2),
        "only_cross_attention": dice.per_stage(stages, False, False, True),
        "transformer_layers_per_block": dice.per_stage(stages, 1, 1, 2, 3, 4),
        "use_linear_projection": dice.chance(0.5),
        "upcast_attention": dice.chance(0.3),
        "controlnet_conditioning_channel_order": dice.one("rgb", "bgr"),
        "conditioning_embedding_out_channels": [dice.randint(2, 5) for _ in range(halvings + 1)],
        "global_pool_conditions": dice.chance(0.3),
    }
    samples, (height, width) = dice.randint(1, 3), dice.sides()
    scale = 2**halvings
    call = {
        "sample": dice.memory(dice.normal(samples, config["in_channels"], height, width)),
        "timestep": dice.time(samples, whole=False),
        "encoder_hidden_states": dice.normal(samples, dice.randint(1, 7), TEXT),
        "controlnet_cond": dice.memory(
            dice.normal(samples, config["conditioning_channels"], scale * height, scale * width)
        ),
        "conditioning_scale": dice.one(1.0, 0.5, 0.0, torch.tensor(0.25)),
        "guess_mode": dice.chance(0.3),
    }
    if dice.chance(0.3):
        config["encoder_hid_dim"] = 8
    add_classes(dice, config, call, samples, 4 * config["block_out_channels"][0])
    config.pop("class_embeddings_concat", None)
    extra = dice.one(None, None, "text_time", "text")
    if extra == "text_time":
        config["addition_time_embed_dim"] = 4
        config.setdefault("projection_class_embeddings_input_dim", 30)
        call["added_cond_kwargs"] = {"text_embeds": dice.normal(samples, 6), "time_ids": dice.normal(samples, 6)}
    config |= {"addition_embed_type": extra, "addition_embed_type_num_heads": 2}
    if extra == "text":
        config.pop("encoder_hid_dim", None)
    if dice.chance(0.3):
        call["cross_attention_kwargs"] = dice.one({}, {"scale": 1.0}, {"scale": 0.5})
    return Drawn(ControlNetModel, config, call, seed)


FAMILIES = ((_plain, 3), (_skips, 1), (_crossed, 5), (_simple, 3), (_k_blocks, 1), (_controlnet, 3))
"""How each kind of layout is drawn, and how often."""
