"""Whole pipelines of diffusers, accelerated: the same images, every network and the scheduler, and the way back."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from drop_in import relative
from tiny_pipelines import NO_SAFETY, NO_TEXT, PIPELINES, PROMPT, make, unet, vae
from torch import nn

import fastdiff
import fastdiff.integrations.diffusers as drop_in
from fastdiff.errors import InputError
from fastdiff.models.conversion import entry
from fastdiff.models.forward import forward

KINDS = ("DDPM", "SD", "SD img2img", "SD inpaint", "ControlNet", "SDXL", "DiT")
STEPS = 4


def pipeline(kind: str) -> Any:
    """A pipeline whose networks are its own, so that other tests see nothing of what becomes of them."""
    return copy.deepcopy(make(kind, diffusers.DDIMScheduler()))


def images(kind: str, pipe: Any) -> np.ndarray:
    torch.manual_seed(1)
    given = {**PIPELINES[kind][2], "generator": torch.Generator().manual_seed(2), "output_type": "np"}
    return pipe(num_inference_steps=STEPS, **given).images


@pytest.mark.filterwarnings("ignore:fastdiff. .*runs as before:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_an_accelerated_pipeline_draws_the_same(kind: str) -> None:
    pipe = pipeline(kind)
    expected = images(kind, pipe)
    fastdiff.report(reset=True)
    assert fastdiff.accelerate(pipe) is pipe
    assert type(pipe.scheduler) is drop_in.DDIMScheduler
    actual = images(kind, pipe)
    calls = fastdiff.report().calls
    count = {name: sum(n for (each, _), n in calls.items() if each == name) for name, _ in calls}
    assert count["sampler_step"] == getattr(pipe, "num_timesteps", STEPS)
    assert relative(torch.tensor(actual), torch.tensor(expected)) < 1e-4
    if kind != "DiT":
        assert count["group_norm_silu"] > count["sampler_step"]
        assert any(name.startswith("unet (UNet2D") for name in fastdiff.report().networks)
    fastdiff.restore(pipe)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    parts = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    assert all(forward(module) is None for part in parts for module in part.modules())
    assert np.array_equal(images(kind, pipe), expected)


def test_the_scheduler_is_a_rewrite_of_its_own() -> None:
    pipe = pipeline("DDPM")
    fastdiff.accelerate(pipe, rewrites=["group_norm_silu"], strict=True)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    assert entry(pipe.unet) is not None
    fastdiff.patch_scheduler(pipe)
    fastdiff.restore(pipe)
    assert type(pipe.scheduler) is drop_in.DDIMScheduler, "it was not accelerate that put it there"


def test_strict_is_all_or_nothing() -> None:
    pipe = copy.deepcopy(make("SD3", diffusers.FlowMatchEulerDiscreteScheduler()))
    with pytest.raises(InputError, match=r"strict=True.*transformer \(SD3Transformer2DModel\).*no network"):
        fastdiff.accelerate(pipe, strict=True)
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
    fastdiff.report(reset=True)
    with pytest.warns(UserWarning, match="SD3Transformer2DModel"):
        fastdiff.accelerate(pipe)
    reason = "fastdiff has no network for SD3Transformer2DModel; blocks inside it are accelerated"
    assert ("transformer (SD3Transformer2DModel)", reason) in fastdiff.report().left


def test_a_scheduler_that_cannot_be_replaced_stops_strict() -> None:
    class Own(diffusers.DDIMScheduler):
        pass

    pipe = copy.deepcopy(make("DDPM", Own()))
    with pytest.raises(InputError, match="subclass"):
        fastdiff.accelerate(pipe, strict=True)
    assert entry(pipe.unet) is None
    fastdiff.accelerate(pipe)
    assert type(pipe.scheduler) is Own
    assert entry(pipe.unet) is not None


def test_text_encoders_are_left_alone() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=10, **size))
    pipe = diffusers.StableDiffusionPipeline(
        vae=copy.deepcopy(vae()),
        unet=copy.deepcopy(unet()),
        scheduler=diffusers.DDIMScheduler(),
        **{**NO_TEXT, **NO_SAFETY, "text_encoder": encoder},
    )
    fastdiff.accelerate(pipe)
    assert all(forward(module) is None for module in encoder.modules())


def test_a_lora_of_a_pipeline_takes_effect() -> None:
    from peft import LoraConfig

    pipe = pipeline("SD")
    fastdiff.accelerate(pipe, rewrites=None)
    plain = images("SD", pipe)
    torch.manual_seed(3)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "one")
    loaded = images("SD", pipe)
    pipe.set_adapters("one", 0.4)
    scaled = images("SD", pipe)
    pipe.fuse_lora(components=["unet"])
    fused = images("SD", pipe)
    pipe.unfuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    assert relative(torch.tensor(images("SD", pipe)), torch.tensor(plain)) < 1e-4
    assert relative(torch.tensor(fused), torch.tensor(scaled)) < 1e-4
    assert min(np.abs(loaded - plain).max(), np.abs(scaled - loaded).max()) > 1e-3


def test_an_ip_adapter_is_left() -> None:
    """Its processors are modules, and its projection turns the text into a pair."""
    pipe = pipeline("SD")
    fastdiff.accelerate(pipe)
    pipe.unet.encoder_hid_proj = nn.Identity()
    with torch.no_grad(), pytest.warns(UserWarning, match="encoder_hid_proj"):
        pipe.unet(torch.randn(1, 4, 8, 8), 3, PROMPT["prompt_embeds"])


def test_a_pipeline_without_networks_is_refused() -> None:
    with pytest.raises(InputError, match="without a network"):
        fastdiff.accelerate(SimpleNamespace(components={"scheduler": None}))
