"""Pipelines of diffusers around networks of a few thousand random weights: nothing is downloaded, a run takes moments.

Text encoders and tokenizers are left out, as the pipelines allow: prompts are given as embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor, nn

WIDTH = 8
"""Of prompt embeddings, pooled or not."""
SIDE = 16
"""Of the images; latents have half of it."""


def random(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """A network that is made once, from weights that depend on nothing else."""

    @lru_cache(maxsize=1)
    def made() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make().eval()

    return made


BLOCKS = {"layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
CROSS = {
    "sample_size": SIDE // 2,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    **BLOCKS,
}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
PLAIN = {"down_block_types": ("DownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "UpBlock2D"), **BLOCKS}
HEADS = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1}
TEXT = {"joint_attention_dim": WIDTH, "pooled_projection_dim": WIDTH}


@seeded
def vae() -> nn.Module:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return diffusers.AutoencoderKL(latent_channels=4, sample_size=SIDE, shift_factor=0.1, **blocks, **BLOCKS)


@seeded
def pixel_unet() -> nn.Module:
    return diffusers.UNet2DModel(sample_size=8, **PLAIN)


@seeded
def unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(**CROSS)


@seeded
def unet_xl() -> nn.Module:
    return diffusers.UNet2DConditionModel(projection_class_embeddings_input_dim=WIDTH + 6 * 4, **CROSS, **XL)


@seeded
def controlnet() -> nn.Module:
    made = diffusers.ControlNetModel.from_unet(unet(), conditioning_embedding_out_channels=(4, 8))
    for block in (*made.controlnet_down_blocks, made.controlnet_mid_block):
        nn.init.normal_(block.weight, std=0.1)  # zero to begin with, which would leave the control without effect
    return made


@seeded
def dit() -> nn.Module:
    return diffusers.DiTTransformer2DModel(
        sample_size=SIDE // 2, in_channels=4, out_channels=8, num_embeds_ada_norm=1000, norm_num_groups=4, **HEADS
    )


@seeded
def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=SIDE // 2, in_channels=4, out_channels=4, caption_projection_dim=16, **HEADS, **TEXT
    )


@seeded
def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=16, num_single_layers=1, axes_dims_rope=(2, 2, 4), **HEADS, **TEXT
    )


NO_TEXT = {"text_encoder": None, "tokenizer": None}
NO_TEXT_2 = {**NO_TEXT, "text_encoder_2": None, "tokenizer_2": None}
NO_TEXT_3 = {**NO_TEXT_2, "text_encoder_3": None, "tokenizer_3": None}
NO_SAFETY = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
PROMPT = {"prompt_embeds": random(1, 5, WIDTH), "negative_prompt_embeds": random(1, 5, WIDTH, seed=6)}
POOLED = {"pooled_prompt_embeds": random(1, WIDTH), "negative_pooled_prompt_embeds": random(1, WIDTH, seed=6)}
IMAGE = random(1, 3, SIDE, SIDE).sigmoid()
MASK = (torch.arange(SIDE) < SIDE // 2).float().expand(1, 1, SIDE, SIDE)

Maker = Callable[[Any], Any]
PIPELINES: dict[str, tuple[Maker, Callable[[], nn.Module], dict[str, Any]]] = {
    "DDPM": (lambda s: diffusers.DDPMPipeline(pixel_unet(), s), pixel_unet, {"batch_size": 1}),
    "consistency": (lambda s: diffusers.ConsistencyModelPipeline(pixel_unet(), s), pixel_unet, {"batch_size": 1}),
    "score SDE": (lambda s: diffusers.ScoreSdeVePipeline(pixel_unet(), s), pixel_unet, {"batch_size": 1}),
    "RePaint": (
        lambda s: diffusers.RePaintPipeline(pixel_unet(), s),
        pixel_unet,
        {"image": IMAGE, "mask_image": MASK, "jump_length": 2, "jump_n_sample": 2},
    ),
    "SD": (
        lambda s: diffusers.StableDiffusionPipeline(vae=vae(), unet=unet(), scheduler=s, **NO_TEXT, **NO_SAFETY),
        unet,
        PROMPT,
    ),
    "SD img2img": (
        lambda s: diffusers.StableDiffusionImg2ImgPipeline(vae=vae(), unet=unet(), scheduler=s, **NO_TEXT, **NO_SAFETY),
        unet,
        {**PROMPT, "image": IMAGE, "strength": 0.7},
    ),
    "SD inpaint": (
        lambda s: diffusers.StableDiffusionInpaintPipeline(vae=vae(), unet=unet(), scheduler=s, **NO_TEXT, **NO_SAFETY),
        unet,
        {**PROMPT, "image": IMAGE, "mask_image": MASK, "height": SIDE, "width": SIDE, "strength": 0.9},
    ),
    "ControlNet": (
        lambda s: diffusers.StableDiffusionControlNetPipeline(
            vae=vae(), unet=unet(), controlnet=controlnet(), scheduler=s, **NO_TEXT, **NO_SAFETY
        ),
        unet,
        {**PROMPT, "image": IMAGE},
    ),
    "SDXL": (
        lambda s: diffusers.StableDiffusionXLPipeline(vae=vae(), unet=unet_xl(), scheduler=s, **NO_TEXT_2),
        unet_xl,
        {**PROMPT, **POOLED},
    ),
    "DiT": (lambda s: diffusers.DiTPipeline(dit(), vae(), s), dit, {"class_labels": [3]}),
    "SD3": (
        lambda s: diffusers.StableDiffusion3Pipeline(transformer=sd3(), vae=vae(), scheduler=s, **NO_TEXT_3),
        sd3,
        {**PROMPT, **POOLED, "height": SIDE, "width": SIDE},
    ),
    "Flux": (
        lambda s: diffusers.FluxPipeline(transformer=flux(), vae=vae(), scheduler=s, **NO_TEXT_2),
        flux,
        {
            "prompt_embeds": random(1, 5, WIDTH),
            "pooled_prompt_embeds": random(1, WIDTH),
            "height": SIDE,
            "width": SIDE,
        },
    ),
}
"""By a name: how to make it around a scheduler, its network, and the arguments of a call."""


def make(kind: str, scheduler: Any) -> Any:
    pipe = PIPELINES[kind][0](scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(kind: str, pipe: Any, steps: int, **arguments: Any) -> tuple[Any, list[Tensor]]:
    """The images of a run, and what the network was given at each call of it."""
    seen: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))).clone())

    network = PIPELINES[kind][1]()
    handle = network.register_forward_pre_hook(look, with_kwargs=True)
    torch.manual_seed(1)  # DiT's pipeline hands no generator to the scheduler
    try:
        generator = torch.Generator().manual_seed(2)
        given = {**PIPELINES[kind][2], "generator": generator, "output_type": "np", **arguments}
        return pipe(num_inference_steps=steps, **given).images, seen
    finally:
        handle.remove()


def conditional(**changes: Any) -> nn.Module:
    """The text's network, with other settings."""
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(**{**CROSS, **changes}).eval()


def parts(network: nn.Module | None = None, **more: Any) -> dict[str, Any]:
    """What a pipeline of latents is made of, nothing of it shared with another one."""
    network = copy.deepcopy(unet()) if network is None else network
    return {"vae": copy.deepcopy(vae()), "unet": network, "scheduler": diffusers.DDIMScheduler(), **more}


def images(pipe: Any, **arguments: Any) -> np.ndarray:
    """What a run of a few steps gives: pictures, frames, sound or embeddings."""
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(1)
    given = {"generator": torch.Generator().manual_seed(2), "num_inference_steps": 3, "output_type": "np", **arguments}
    return np.asarray(pipe(**given)[0])
