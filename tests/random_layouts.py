"""Small networks of diffusers drawn at random from all that their constructors and calls take."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

ACTIVATIONS = ("silu", "silu", "silu", "swish", "gelu", "mish", "relu")
TEXT = 12
"""Channels of the text."""

Config = dict[str, Any]


@dataclass(frozen=True)
class Drawn:
    """A network's class and configuration, and what it is called with."""

    kind: type[nn.Module]
    config: Config
    arguments: Config
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        """float64, but where the library's code runs in float32 alone."""
        late = self.kind is not UNet2DConditionModel and self.config.get("class_embed_type") == "timestep"
        return torch.float32 if late else torch.float64

    def network(self) -> Any:
        """The network in that dtype, every parameter random."""
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            made = self.kind(**self.config).eval().requires_grad_(False).to(self.dtype)
            for name, parameter in made.named_parameters():
                if parameter.dim() <= 1:
                    parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.3)
                elif not parameter.any():
                    parameter.normal_(0.0, parameter[0].numel() ** -0.5)
        return made


class Dice(random.Random):
    """Draws of the things that configurations are made of."""

    def one(self, *values: Any) -> Any:
        return self.choice(values)

    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def per_stage(self, stages: int, *values: Any) -> Any:
        """One value for all stages, or one for each."""
        return [self.choice(values) for _ in range(stages)] if self.chance(0.4) else self.choice(values)

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(31))
        return torch.randn(shape, generator=generator, dtype=torch.float64) * scale

    def mask(self, *shape: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.getrandbits(31))
        return (torch.rand(shape, generator=generator) < 0.7).to(self.one(torch.int64, torch.bool, torch.float64))

    def sides(self) -> tuple[int, int]:
        return self.randint(5, 11), self.randint(5, 11)

    def memory(self, sample: Tensor) -> Tensor:
        """The same values, laid out in one of the ways in which callers lay them out."""
        how = self.one("contiguous", "contiguous", "channels last", "a part", "transposed")
        if how == "channels last":
            return sample.contiguous(memory_format=torch.channels_last)
        if how == "a part":
            return torch.cat([sample, sample], dim=1)[:, : sample.shape[1]]
        if how == "transposed":
            return sample.transpose(2, 3).contiguous().transpose(2, 3)
        return sample

    def time(self, samples: int, *, whole: bool) -> Any:
        """A time in one of the forms in which it is given."""
        number = self.randint(1, 900)
        forms: list[Any] = [
            number,
            torch.tensor(number),
            torch.tensor([number]),
            torch.tensor([self.randint(1, 900) for _ in range(samples)]),
            torch.tensor([900, number, 3])[1],
        ]
        if not whole:
            forms += [number + 0.25, torch.tensor(number + 0.5), torch.full((samples,), number + 0.5).double()]
        return self.choice(forms)


def draw(seed: int) -> Drawn:
    """The layout of that number."""
    dice = Dice(seed)
    make = dice.choices([make for make, _ in FAMILIES], [weight for _, weight in FAMILIES])[0]
    drawn = make(dice, seed)
    residuals = _residuals(dice, drawn) if drawn.kind is UNet2DConditionModel and dice.chance(0.4) else {}
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
    return _plain_call(dice, seed, config, _even(dice, stages))


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
    return _plain_call(dice, seed, config, _even(dice, stages))


def _plain_call(dice: Dice, seed: int, config: Config, sides: tuple[int, int]) -> Drawn:
    samples, base = dice.randint(1, 3), config["block_out_channels"][0]
    kind = dice.one("positional", "positional", "fourier", "learned")
    config |= {"time_embedding_type": kind, "num_train_timesteps": 1000 if kind == "learned" else None}
    config["time_embedding_dim"] = dice.one(None, None, 10)
    width = config["time_embedding_dim"] or 4 * base
    call = {"sample": dice.memory(dice.normal(samples, config["in_channels"], *sides))}
    # The library gives a table of learned times to whole numbers alone.
    call["timestep"] = dice.time(samples, whole=kind == "learned")
    classes = dice.one(None, None, "labels", "timestep", "identity")
    if classes == "labels":
        config["num_class_embeds"] = 7
        call["class_labels"] = torch.tensor([dice.randrange(7) for _ in range(samples)])
    elif classes is not None:
        config["class_embed_type"] = classes
        whole = torch.tensor([dice.randint(1, 9) for _ in range(samples)])
        call["class_labels"] = whole if classes == "timestep" else dice.normal(samples, width)
    return Drawn(UNet2DModel, config, call, seed)


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
    return _conditional_call(dice, seed, config, dice.sides() if easy else _even(dice, stages))


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
    drawn = _conditional_call(dice, seed, config, _even(dice, stages))
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
    return _conditional_call(dice, seed, config, _even(dice, stages, 2))


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


def _conditional_call(dice: Dice, seed: int, config: Config, sides: tuple[int, int]) -> Drawn:
    samples = dice.randint(1, 3)
    width = config["time_embedding_dim"] or config["block_out_channels"][0] * (
        2 if config["time_embedding_type"] == "fourier" else 4
    )
    call = {"sample": dice.memory(dice.normal(samples, config["in_channels"], *sides))}
    call["timestep"] = dice.time(samples, whole=False)
    call["encoder_hidden_states"] = dice.normal(samples, dice.randint(2, 7), config["cross_attention_dim"])
    _add_classes(dice, config, call, samples, width)
    if "KCrossAttnDownBlock2D" in config["down_block_types"]:
        config.pop("class_embeddings_concat", None)
    _add_text(dice, config, call, samples)
    _add_extras(dice, config, call, samples)
    if dice.chance(0.25):
        config["time_cond_proj_dim"] = 5
        if dice.chance(0.8):
            call["timestep_cond"] = dice.normal(samples, 5)
    if dice.chance(0.3) and "encoder_hid_dim_type" not in config:
        text = call["encoder_hidden_states"].shape[1]
        simple = any("Simple" in str(kind) for kind in (config["mid_block_type"], *config["down_block_types"]))
        shape = (samples, text) if simple or dice.chance(0.7) else (samples, 1, text)
        call["encoder_attention_mask"] = dice.mask(*shape)
    if dice.chance(0.3):
        call["cross_attention_kwargs"] = dice.one({}, {"scale": 1.0}, {"scale": 0.5}, {"scale": 0})
    if config.get("attention_type", "default") != "default" and dice.chance(0.8):
        call["cross_attention_kwargs"] = {"gligen": _boxes(dice, config, samples)}
    return Drawn(UNet2DConditionModel, config, call, seed)


def _add_text(dice: Dice, config: Config, call: Config, samples: int) -> None:
    """The projection of what stands for the text."""
    if dice.chance(0.6):
        return
    kind = config["encoder_hid_dim_type"] = dice.one("text_proj", "text_image_proj", "image_proj")
    config["encoder_hid_dim"] = 8
    if kind == "image_proj":
        call["added_cond_kwargs"] = {"image_embeds": dice.normal(samples, 8)}
        if dice.chance(0.5):
            call["encoder_hidden_states"] = None
        return
    call["encoder_hidden_states"] = dice.normal(samples, dice.randint(2, 5), 8)
    if kind == "text_image_proj":
        call["added_cond_kwargs"] = {"image_embeds": dice.normal(samples, config["cross_attention_dim"])}


def _add_classes(dice: Dice, config: Config, call: Config, samples: int, width: int) -> None:
    kind = dice.one(None, None, None, "labels", "timestep", "identity", "projection", "simple_projection")
    if kind is None:
        return
    config["class_embeddings_concat"] = dice.chance(0.3)
    if kind == "labels":
        config["num_class_embeds"] = 5
        call["class_labels"] = torch.tensor([dice.randrange(5) for _ in range(samples)])
        return
    config["class_embed_type"] = kind
    if kind == "timestep":
        call["class_labels"] = torch.tensor([dice.randint(1, 99) for _ in range(samples)])
    elif kind == "identity":
        call["class_labels"] = dice.normal(samples, width)
    else:
        config["projection_class_embeddings_input_dim"] = 30
        call["class_labels"] = dice.normal(samples, 30)


def _add_extras(dice: Dice, config: Config, call: Config, samples: int) -> None:
    """What is added to the embedding of the time."""
    kind = dice.one(None, None, None, "text_time", "text", "text_image", "image", "image_hint")
    tokens = config.get("encoder_hid_dim_type")
    if config.get("class_embeddings_concat"):
        return
    # What one part of the network takes for a text or a picture has to go with what another does.
    if (kind == "text" and tokens == "image_proj") or (kind == "text_image" and tokens is not None):
        return
    added = call.setdefault("added_cond_kwargs", {})
    if kind == "text_time":
        config["addition_time_embed_dim"] = 4
        config.setdefault("projection_class_embeddings_input_dim", 30)
        added |= {"text_embeds": dice.normal(samples, 6), "time_ids": dice.normal(samples, 6, scale=100)}
    elif kind == "text":
        config["addition_embed_type_num_heads"] = dice.one(1, 2, 4)
    elif kind == "text_image":
        size = config["cross_attention_dim"]
        added |= {"text_embeds": dice.normal(samples, size), "image_embeds": dice.normal(samples, size)}
    elif kind in ("image", "image_hint"):
        config["encoder_hid_dim"] = 8
        config.setdefault("encoder_hid_dim_type", "image_proj")
        if config["encoder_hid_dim_type"] != "image_proj":
            return
        added["image_embeds"] = dice.normal(samples, 8)
        if kind == "image_hint":
            height, width = call["sample"].shape[2:]
            added["hint"] = dice.normal(samples, 3, 8 * height, 8 * width)
            config["in_channels"] += 4
    config["addition_embed_type"] = kind


def _boxes(dice: Dice, config: Config, samples: int) -> Config:
    """What GLIGEN is told: boxes, which of them are real, and what is in them."""
    count, width = dice.randint(1, 4), config["cross_attention_dim"]
    told = {"boxes": dice.normal(samples, count, 4).sigmoid(), "masks": dice.mask(samples, count).double()}
    if config["attention_type"] == "gated":
        return {**told, "positive_embeddings": dice.normal(samples, count, width)}
    return {
        **told,
        "phrases_masks": dice.mask(samples, count).double(),
        "image_masks": dice.mask(samples, count).double(),
        "phrases_embeddings": dice.normal(samples, count, width),
        "image_embeddings": dice.normal(samples, count, width),
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
    _add_classes(dice, config, call, samples, 4 * config["block_out_channels"][0])
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


def _residuals(dice: Dice, drawn: Drawn) -> Config:
    """What a ControlNet or a T2I-Adapter adds, in the shapes that the network's maps have."""
    network, stored, ends, middle = drawn.network(), [], [], []
    network.conv_in.register_forward_hook(lambda _, given, out: stored.append(out))
    for block in network.down_blocks:
        layers = len(block.resnets)
        crossed = getattr(block, "has_cross_attention", False)
        block.register_forward_hook(lambda _, given, out: stored.extend(out[1]))
        block.register_forward_hook(
            lambda _, given, out, crossed=crossed, layers=layers: ends.append(out[1][layers - 1] if crossed else out[0])
        )
    if network.mid_block is not None:
        network.mid_block.register_forward_hook(lambda _, given, out: middle.append(out))
    with torch.no_grad():
        network(**drawn.arguments)
    lowest = middle[0] if middle else ends[-1]
    kind, found = dice.one("controlnet", "adapter", "both"), {}
    if any(each is None for each in (*stored, *ends)):
        return {}
    if kind != "adapter":
        found["down_block_additional_residuals"] = tuple(dice.normal(*each.shape) for each in stored)
        found["mid_block_additional_residual"] = dice.normal(*lowest.shape)
    if kind != "controlnet" and "SimpleCrossAttnDownBlock2D" not in drawn.config["down_block_types"]:
        within = [dice.normal(*each.shape) for each in (*ends, *middle)]
        found["down_intrablock_additional_residuals"] = within[: dice.randint(1, len(within))]
    return found


FAMILIES = ((_plain, 3), (_skips, 1), (_crossed, 5), (_simple, 3), (_k_blocks, 1), (_controlnet, 3))
"""How each kind of layout is drawn, and how often."""
