"""Calls of randomly drawn networks, of all that they take."""

from __future__ import annotations

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from random_draws import Config, Dice, Drawn


def plain_call(dice: Dice, seed: int, config: Config, sides: tuple[int, int]) -> Drawn:
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


def conditional_call(dice: Dice, seed: int, config: Config, sides: tuple[int, int]) -> Drawn:
    samples = dice.randint(1, 3)
    width = config["time_embedding_dim"] or config["block_out_channels"][0] * (
        2 if config["time_embedding_type"] == "fourier" else 4
    )
    call = {"sample": dice.memory(dice.normal(samples, config["in_channels"], *sides))}
    call["timestep"] = dice.time(samples, whole=False)
    call["encoder_hidden_states"] = dice.normal(samples, dice.randint(2, 7), config["cross_attention_dim"])
    add_classes(dice, config, call, samples, width)
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


def add_classes(dice: Dice, config: Config, call: Config, samples: int, width: int) -> None:
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


def add_mask(dice: Dice, config: Config, call: Config) -> None:
    """What is attended to: pixels, where all attentions over them have the same ones, or words beside all pixels."""
    samples, pixels = len(call["sample"]), call["sample"].shape[2:].numel()
    only_text = [config["only_cross_attention"], config.get("mid_block_only_cross_attention")]
    if any(True in each if isinstance(each, list) else each for each in only_text):
        return
    if any("Simple" in str(kind) for kind in (config["mid_block_type"], *config["down_block_types"])):
        # As many words as pixels somewhere, and the library takes the mask for one of both.
        sizes = {pixels // 4**stage for stage in range(len(config["block_out_channels"]))}
        if "encoder_hid_dim_type" not in config and call["encoder_hidden_states"].shape[1] not in sizes:
            call["attention_mask"] = dice.mask(samples, call["encoder_hidden_states"].shape[1])
    elif len(config["block_out_channels"]) == 1:
        shapes = ((samples, pixels), (samples, pixels), (samples, 1, pixels), (samples, pixels, pixels))
        call["attention_mask"] = dice.mask(*dice.choice(shapes))


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


def drawn_residuals(dice: Dice, drawn: Drawn) -> Config:
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
