"""More of diffusers' pipelines, and what is done with pipelines: the image is the unaccelerated one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from drop_in import relative
from tiny_pipelines import (
    BLOCKS,
    IMAGE,
    MASK,
    NO_SAFETY,
    NO_TEXT,
    NO_TEXT_2,
    PIPELINES,
    PLAIN,
    POOLED,
    PROMPT,
    SIDE,
    WIDTH,
    XL,
    conditional,
    controlnet,
    images,
    make,
    parts,
    random,
    unet,
    unet_xl,
)

import fastdiff
from fastdiff.models.forward import forward

pytestmark = pytest.mark.filterwarnings("ignore:The configuration file:FutureWarning")
SD = {**NO_TEXT, **NO_SAFETY}
SIZE = {"height": SIDE, "width": SIDE}
BOTH = {**PROMPT, **POOLED}


def several_controls() -> Any:
    nets = [copy.deepcopy(controlnet()), copy.deepcopy(controlnet())]
    return diffusers.StableDiffusionControlNetPipeline(**parts(controlnet=nets), **SD)


def control() -> Any:
    return diffusers.StableDiffusionControlNetPipeline(**parts(controlnet=copy.deepcopy(controlnet())), **SD)


def refiner() -> Any:
    network = conditional(**XL, projection_class_embeddings_input_dim=WIDTH + 5 * 4)
    return diffusers.StableDiffusionXLImg2ImgPipeline(**parts(network), **NO_TEXT_2, requires_aesthetics_score=True)


def xl_inpaint() -> Any:
    network = conditional(in_channels=9, **XL, projection_class_embeddings_input_dim=WIDTH + 6 * 4)
    return diffusers.StableDiffusionXLInpaintPipeline(**parts(network), **NO_TEXT_2)


def xl() -> Any:
    return diffusers.StableDiffusionXLPipeline(**parts(copy.deepcopy(unet_xl())), **NO_TEXT_2)


def upscale() -> Any:
    network = conditional(in_channels=7, num_class_embeds=1000)
    return diffusers.StableDiffusionUpscalePipeline(
        **parts(network), low_res_scheduler=diffusers.DDPMScheduler(), **NO_TEXT
    )


def depth() -> Any:
    none = {"depth_estimator": None, "feature_extractor": None}
    return diffusers.StableDiffusionDepth2ImgPipeline(**parts(conditional(in_channels=5)), **none, **NO_TEXT)


def instructed() -> Any:
    return diffusers.StableDiffusionInstructPix2PixPipeline(**parts(conditional(in_channels=8)), **SD)


def consistent() -> Any:
    given = {**parts(conditional(time_cond_proj_dim=8)), "scheduler": diffusers.LCMScheduler()}
    return diffusers.LatentConsistencyModelPipeline(**given, **SD)


def perturbed() -> Any:
    return diffusers.StableDiffusionPAGPipeline(**parts(), **SD, pag_applied_layers="mid")


def unconditional() -> Any:
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(sample_size=8, in_channels=4, out_channels=4, **PLAIN).eval()
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    codes = diffusers.VQModel(latent_channels=4, **kinds, **BLOCKS).eval()
    return diffusers.LDMPipeline(vqvae=codes, unet=network, scheduler=diffusers.DDIMScheduler())


CASES: dict[str, tuple[Callable[[], Any], dict[str, Any], str | None]] = {
    "several controls": (
        several_controls,
        {**PROMPT, "image": [IMAGE, IMAGE / 2], "controlnet_conditioning_scale": [0.5, 0.8]},
        None,
    ),
    "a control that guesses": (control, {**PROMPT, "image": IMAGE, "guess_mode": True}, None),
    "refiner": (refiner, {**BOTH, "image": IMAGE, "strength": 0.8}, None),
    "SDXL inpaint": (xl_inpaint, {**BOTH, **SIZE, "image": IMAGE, "mask_image": MASK}, None),
    "rescaled guidance": (xl, {**BOTH, "guidance_rescale": 0.5, "num_images_per_prompt": 2, "clip_skip": 1}, None),
    "upscale": (upscale, {**PROMPT, "image": IMAGE}, None),
    "depth": (depth, {**PROMPT, "image": IMAGE, "depth_map": random(1, SIDE, SIDE)}, None),
    "instructed": (instructed, {**PROMPT, "image": IMAGE}, None),
    "consistent": (consistent, {"prompt_embeds": PROMPT["prompt_embeds"]}, None),
    "perturbed attention": (perturbed, {**PROMPT, "pag_scale": 2.0}, "PAG"),
    "unconditional": (unconditional, {}, "no network for VQModel"),
}


def assert_same(actual: np.ndarray, expected: np.ndarray) -> None:
    assert relative(torch.tensor(actual), torch.tensor(expected)) < 1e-4


@pytest.mark.filterwarnings("ignore:fastdiff. .*runs as before:UserWarning")
@pytest.mark.parametrize(("build", "arguments", "reason"), CASES.values(), ids=CASES)
def test_an_accelerated_pipeline_draws_the_same(build: Any, arguments: dict[str, Any], reason: str | None) -> None:
    pipe = build()
    expected = images(pipe, **arguments)
    fastdiff.report(reset=True)
    fastdiff.accelerate(pipe)
    assert_same(images(pipe, **arguments), expected)
    left = fastdiff.report().left
    assert all(reason is not None and reason in said for _, said in left), left
    assert bool(left) == (reason is not None)
    fastdiff.restore(pipe)
    assert np.array_equal(images(pipe, **arguments), expected)


def plain() -> Any:
    return copy.deepcopy(make("SD", diffusers.DDIMScheduler()))


def sliced(pipe: Any) -> None:
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    pipe.enable_attention_slicing()


def freed(pipe: Any) -> None:
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)


def fused(pipe: Any) -> None:
    pipe.fuse_qkv_projections()


def fused_for_a_while(pipe: Any) -> None:
    pipe.fuse_qkv_projections()
    pipe.unfuse_qkv_projections()


def channels_last(pipe: Any) -> None:
    pipe.unet.to(memory_format=torch.channels_last)
    pipe.vae.to(memory_format=torch.channels_last)


def other_dtype_and_back(pipe: Any) -> None:
    pipe.to(torch.float64)
    pipe.to(torch.float32)


def unchanged(pipe: Any) -> None:
    pass


SETTINGS = {
    f.__name__: f for f in (unchanged, sliced, freed, fused, fused_for_a_while, channels_last, other_dtype_and_back)
}


@pytest.mark.filterwarnings("ignore:fastdiff. .*runs as before:UserWarning")
@pytest.mark.parametrize("later", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_a_setting_means_what_it_meant(setting: Callable[[Any], None], later: bool) -> None:
    pipe, other = plain(), plain()
    setting(other)
    expected = images(other, **PROMPT)
    if later:
        images(fastdiff.accelerate(pipe), **PROMPT)
        setting(pipe)
    else:
        setting(pipe)
        fastdiff.accelerate(pipe)
    assert_same(images(pipe, **PROMPT), expected)


def test_a_pipeline_that_is_saved_and_loaded(tmp_path: Path) -> None:
    pipe = plain()
    expected = images(pipe, **PROMPT)
    fastdiff.accelerate(pipe)
    images(pipe, **PROMPT)
    pipe.unet.save_pretrained(tmp_path / "unet")
    pipe.vae.save_pretrained(tmp_path / "vae")
    again = diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet"),
        vae=diffusers.AutoencoderKL.from_pretrained(tmp_path / "vae"),
        scheduler=diffusers.DDIMScheduler(),
        **SD,
    )
    assert np.array_equal(images(again, **PROMPT), expected)


def test_a_pipeline_made_of_another_is_accelerated_with_it() -> None:
    pipe = fastdiff.accelerate(plain())
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    arguments = {**PIPELINES["SD img2img"][2], "num_inference_steps": 4}
    fastdiff.report(reset=True)
    actual = images(other, **arguments)
    assert ("group_norm_silu", "native") in fastdiff.report().calls
    fastdiff.restore(other)
    assert forward(pipe.unet) is None
    assert_same(actual, images(other, **arguments))


def test_a_callback_sees_every_step_and_may_change_the_latents() -> None:
    def halve(pipe: Any, step: int, t: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(step)
        return {"latents": given["latents"] * 0.5}

    pipe = plain()
    seen: list[int] = []
    expected = images(pipe, **PROMPT, callback_on_step_end=halve)
    fastdiff.accelerate(pipe)
    assert_same(images(pipe, **PROMPT, callback_on_step_end=halve), expected)
    assert seen == [0, 1, 2] * 2


def test_parts_of_the_original_can_be_called_alone() -> None:
    """As caches of features do, which call the stages of a U-Net themselves."""
    network = copy.deepcopy(unet())
    x, time, text = random(1, 8, 8, 8), random(1, 32), PROMPT["prompt_embeds"]
    with torch.no_grad():
        expected = network.down_blocks[1](x, time, text)[0]
        fastdiff.accelerate(network)
        network(random(1, 4, 8, 8), 3, text)
        assert torch.equal(network.down_blocks[1](x, time, text)[0], expected)
