"""How the small pipelines of rare_pipelines.py are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.pipelines.audioldm2.modeling_audioldm2 import AudioLDM2UNet2DConditionModel
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt
from tiny_pipelines import (
    BLOCKS,
    CROSS,
    NO_SAFETY,
    NO_TEXT,
    NO_TEXT_2,
    SIDE,
    WIDTH,
    XL,
    conditional,
    parts,
    random,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    GPT2Config,
    GPT2LMHeadModel,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
    T5Config,
    T5EncoderModel,
)

SD = {**NO_TEXT, **NO_SAFETY}
ADDED = {**XL, "projection_class_embeddings_input_dim": WIDTH + 6 * 4}


def seeded(make: Callable[..., nn.Module], **config: Any) -> Any:
    torch.manual_seed(0)
    return make(**config).eval()


def xl(**changes: Any) -> dict[str, Any]:
    return {**parts(conditional(**ADDED, **changes)), **NO_TEXT_2}


def union() -> Any:
    config = {**CROSS, **ADDED, "conditioning_embedding_out_channels": (4, 8), "num_trans_head": 1}
    del config["sample_size"], config["up_block_types"]
    sizes = {"num_control_type": 2, "num_trans_channel": 8, "num_proj_channel": 8}
    network = seeded(diffusers.ControlNetUnionModel, **config, **sizes)
    for block in (*network.controlnet_down_blocks, network.controlnet_mid_block):
        nn.init.normal_(block.weight, std=0.1)
    return diffusers.StableDiffusionXLControlNetUnionPipeline(**xl(), controlnet=network)


def adapter(kind: str, channels: list[int], scale: int) -> Any:
    config = {"channels": channels, "num_res_blocks": 1, "downscale_factor": scale, "adapter_type": kind}
    return seeded(diffusers.T2IAdapter, **config)


CROSSED_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
CROSSED_LAST = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}


def adapted(count: int) -> Any:
    adapters = [adapter("full_adapter", [8, 16], 2) for _ in range(count)]
    given = adapters if count > 1 else adapters[0]
    return diffusers.StableDiffusionAdapterPipeline(**parts(conditional(**CROSSED_FIRST)), adapter=given, **SD)


def adapted_xl() -> Any:
    given = adapter("full_adapter_xl", [8, 16, 16, 16], 4)
    return diffusers.StableDiffusionXLAdapterPipeline(**xl(**CROSSED_LAST), adapter=given)


def upscale() -> Any:
    network = conditional(
        in_channels=8,
        out_channels=5,
        act_fn="gelu",
        attention_head_dim=8,
        norm_num_groups=None,
        block_out_channels=(32, 64, 64),
        down_block_types=("KDownBlock2D", "KCrossAttnDownBlock2D", "KCrossAttnDownBlock2D"),
        up_block_types=("KCrossAttnUpBlock2D", "KCrossAttnUpBlock2D", "KUpBlock2D"),
        mid_block_type=None,
        conv_in_kernel=1,
        conv_out_kernel=1,
        resnet_time_scale_shift="scale_shift",
        time_embedding_type="fourier",
        timestep_post_act="gelu",
        time_cond_proj_dim=WIDTH + 128,
    )
    given = {**parts(network), "scheduler": diffusers.EulerDiscreteScheduler(prediction_type="sample")}
    return diffusers.StableDiffusionLatentUpscalePipeline(**given, **NO_TEXT)


KANDINSKY = {
    "out_channels": 8,
    "encoder_hid_dim": WIDTH,
    "encoder_hid_dim_type": "image_proj",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
}


def kandinsky(kind: str, channels: int, extra: str = "image") -> Any:
    codes = seeded(
        diffusers.VQModel,
        latent_channels=4,
        norm_type="spatial",
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    )
    network = conditional(**KANDINSKY, in_channels=channels, addition_embed_type=extra)
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    return getattr(diffusers, f"KandinskyV22{kind}Pipeline")(unet=network, scheduler=scheduler, movq=codes)


def sound_parts(network: nn.Module) -> dict[str, Any]:
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    voice = SpeechT5HifiGanConfig(
        model_in_dim=SIDE, upsample_initial_channel=16, upsample_rates=[2, 2], upsample_kernel_sizes=[4, 4]
    )
    return {
        **parts(network),
        "vae": seeded(diffusers.AutoencoderKL, in_channels=1, out_channels=1, latent_channels=4, **kinds, **BLOCKS),
        "vocoder": seeded(SpeechT5HifiGan, config=voice),
    }


class Sound(diffusers.AudioLDMPipeline):
    def _encode_prompt(self, *arguments: Any, **more: Any) -> Any:
        return random(2, WIDTH)


def sound() -> Any:
    """Its transformers are given no text: what would look at it looks at the pixels."""
    network = conditional(
        class_embed_type="simple_projection",
        projection_class_embeddings_input_dim=WIDTH,
        class_embeddings_concat=True,
        cross_attention_dim=(8, 16),
    )
    return Sound(**sound_parts(network), **NO_TEXT)


def sound_2() -> Any:
    none = {"projection_model": None, "tokenizer_2": None, "feature_extractor": None}
    text = seeded(T5EncoderModel, config=T5Config(vocab_size=9, d_model=8, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    sizes = {"vocab_size": 9, "n_positions": 9, "n_embd": 8, "n_layer": 1, "n_head": 1}
    words = seeded(GPT2LMHeadModel, config=GPT2Config(**sizes))
    widths = {"cross_attention_dim": ((None, 12, WIDTH),) * 2, "attention_head_dim": 2}
    network = seeded(AudioLDM2UNet2DConditionModel, **{**CROSS, **widths})
    read = {**NO_TEXT, "text_encoder_2": text, "language_model": words}
    return diffusers.AudioLDM2Pipeline(**sound_parts(network), **read, **none)


class Wuerstchen(diffusers.WuerstchenDecoderPipeline):
    def encode_prompt(self, *arguments: Any, **more: Any) -> Any:
        return random(1, 5, 12), None


def wuerstchen() -> Any:
    decoder = seeded(
        WuerstchenDiffNeXt,
        c_cond=8,
        c_hidden=[8, 8, 16],
        nhead=[-1, 2, 2],
        blocks=[1, 1, 1],
        clip_embd=12,
        effnet_embd=16,
        inject_effnet=[False, True, True],
        level_config=["CT", "CTA", "CTA"],
    )
    codes = seeded(PaellaVQModel, levels=1, num_vq_embeddings=12)
    given = {"scheduler": diffusers.DDPMWuerstchenScheduler(), "vqgan": codes, "latent_dim_scale": 4.0}
    return Wuerstchen(decoder=decoder, **given, **NO_TEXT)


class Video(diffusers.StableVideoDiffusionPipeline):
    def _encode_image(self, *arguments: Any, **more: Any) -> Any:
        return random(2, 1, WIDTH)


def video() -> Any:
    network = seeded(
        diffusers.UNetSpatioTemporalConditionModel,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=WIDTH,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=12,
        addition_time_embed_dim=4,
    )
    kinds = {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2}
    codes = seeded(diffusers.AutoencoderKLTemporalDecoder, latent_channels=4, **kinds)
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    return Video(vae=codes, unet=network, scheduler=scheduler, image_encoder=None, feature_extractor=None)


class Words:
    """A tokenizer of phrases that are all alike."""

    def __call__(self, phrases: list[str], **how: Any) -> Any:
        return self.Batch(input_ids=torch.tensor([[1, 2, 3]] * len(phrases)))

    class Batch(dict[str, torch.Tensor]):
        def to(self, device: Any) -> Any:
            return self


def grounded() -> Any:
    """GLIGEN, whose layers are switched off after half of the steps."""
    network = conditional(attention_type="gated")
    for name, parameter in network.named_parameters():
        if name.endswith(("alpha_attn", "alpha_dense")):
            nn.init.constant_(parameter, 0.7)  # zero to begin with
    sizes = {"hidden_size": WIDTH, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = seeded(CLIPTextModel, config=CLIPTextConfig(vocab_size=9, **sizes))
    given = {"text_encoder": text, "tokenizer": Words(), **NO_SAFETY}
    return diffusers.StableDiffusionGLIGENPipeline(**parts(network), **given)
