"""More small pipelines of diffusers: networks that fastdiff has none of its own for, calls that few others make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from rare_builds import (
    adapted,
    adapted_xl,
    grounded,
    kandinsky,
    sound,
    sound_2,
    union,
    upscale,
    video,
    wuerstchen,
    xl,
)
from tiny_pipelines import IMAGE, MASK, POOLED, PROMPT, SIDE, WIDTH, random

SIZE = {"height": SIDE, "width": SIDE}
BOTH = {**PROMPT, **POOLED}

LENGTH = {"audio_length_in_s": 0.004}
IMAGES = {"image_embeds": random(1, WIDTH), "negative_image_embeds": random(1, WIDTH, seed=9)}
POOLED_ALONE = {**POOLED, "prompt": None}
TEXTS = {
    **PROMPT,
    "attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
    "negative_attention_mask": torch.ones(1, 5),
    "generated_prompt_embeds": random(1, 4, 12),
    "negative_generated_prompt_embeds": random(1, 4, 12, seed=6),
}
BOXES = {
    "gligen_phrases": ["a", "b"],
    "gligen_boxes": [[0.1, 0.1, 0.5, 0.5], [0.4, 0.4, 0.9, 0.9]],
    "gligen_scheduled_sampling_beta": 0.5,
    "num_inference_steps": 4,
}
RARE: dict[str, tuple[Callable[[], Any], dict[str, Any], set[str]]] = {
    "ControlNet-Union": (
        union,
        {**BOTH, **SIZE, "control_image": [IMAGE], "control_mode": [1]},
        {"ControlNetUnionModel"},
    ),
    "T2I-Adapter": (lambda: adapted(1), {**PROMPT, **SIZE, "image": IMAGE}, {"T2IAdapter"}),
    "T2I-Adapters": (
        lambda: adapted(2),
        {**PROMPT, **SIZE, "image": [IMAGE, IMAGE / 2], "adapter_conditioning_scale": [0.8, 0.5]},
        {"MultiAdapter"},
    ),
    "T2I-Adapter of SDXL": (
        adapted_xl,
        {**BOTH, **SIZE, "image": IMAGE, "adapter_conditioning_factor": 0.7},
        {"T2IAdapter"},
    ),
    "latent upscale": (upscale, {**PROMPT, **POOLED_ALONE, "image": random(1, 4, 8, 8)}, set()),
    "SDXL img2img": (
        lambda: diffusers.StableDiffusionXLImg2ImgPipeline(**xl()),
        {**BOTH, "image": IMAGE, "strength": 0.8},
        set(),
    ),
    "Kandinsky": (lambda: kandinsky("", 4), {**IMAGES, **SIZE}, {"VQModel"}),
    "Kandinsky img2img": (
        lambda: kandinsky("Img2Img", 4),
        {**IMAGES, **SIZE, "image": IMAGE, "strength": 0.9},
        {"VQModel"},
    ),
    "Kandinsky inpaint": (
        lambda: kandinsky("Inpaint", 9),
        {**IMAGES, **SIZE, "image": IMAGE, "mask_image": MASK.clone()},
        {"VQModel"},
    ),
    "Kandinsky with a hint": (
        lambda: kandinsky("Controlnet", 8, "image_hint"),
        {**IMAGES, **SIZE, "hint": random(1, 3, 64, 64)},
        {"VQModel"},
    ),
    "sound": (sound, {**LENGTH, "prompt_embeds": random(1, WIDTH)}, set()),
    "sound of two texts": (sound_2, {**LENGTH, **TEXTS}, {"AudioLDM2UNet2DConditionModel"}),
    "Wuerstchen": (
        wuerstchen,
        {"image_embeddings": random(1, 16, 4, 4), "prompt": ""},
        {"WuerstchenDiffNeXt", "PaellaVQModel"},
    ),
    "video": (
        video,
        {**SIZE, "image": IMAGE, "num_frames": 2},
        {"UNetSpatioTemporalConditionModel", "AutoencoderKLTemporalDecoder"},
    ),
    "boxes until half way": (grounded, {**PROMPT, **BOXES}, set()),
}
"""By a name: how to make it, the arguments of a call, and the classes that there is no network of ours for."""
