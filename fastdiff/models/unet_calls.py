"""Calls of the library's U-Nets and ControlNets, as calls of ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.calls import Left, output, plain_kwargs, takes
from fastdiff.models.conditions import ADDED
from fastdiff.models.controlnet import ControlNet
from fastdiff.models.stages import stored_maps
from fastdiff.models.transformer import Fuser
from fastdiff.models.unet import UNet


def plain_unet(
    network: UNet,
    module: Any,
    sample: Tensor,
    timestep: Tensor | float,
    class_labels: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    if not isinstance(timestep, Tensor):
        # The library takes a number's whole part.
        timestep = torch.tensor(timestep, dtype=torch.long, device=sample.device)
    takes(_fits(network, sample, timestep) and (class_labels is None) == (network.class_embedding is None))
    return output(module, "UNet2DOutput", network(sample, timestep, class_labels=class_labels), return_dict)


def conditional_unet(
    network: UNet,
    module: Any,
    sample: Tensor,
    timestep: Tensor | float,
    encoder_hidden_states: Tensor,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    down_block_additional_residuals: tuple[Tensor, ...] | None = None,
    mid_block_additional_residual: Tensor | None = None,
    down_intrablock_additional_residuals: tuple[Tensor, ...] | None = None,
    encoder_attention_mask: Tensor | None = None,
    return_dict: bool = True,
) -> Any:
    scale, objects = _attention_kwargs(cross_attention_kwargs, network.config["attention_type"] != "default")
    config = network.config
    count, residuals, within = len(sample), down_block_additional_residuals, down_intrablock_additional_residuals
    if residuals is not None and mid_block_additional_residual is None and within is None:
        raise Left("it was called with down_block_additional_residuals alone, which stand for those within the blocks")
    if residuals is None or mid_block_additional_residual is None:
        # The library takes notice of both or of none.
        residuals = mid_block_additional_residual = None
    if isinstance(encoder_hidden_states, tuple):
        raise Left("encoder_hidden_states is a tuple")
    if within is not None:
        # Other blocks with cross-attention have no place for them.
        takes(not any("CrossAttn" in kind and kind != "CrossAttnDownBlock2D" for kind in config["down_block_types"]))
    # Without class embeddings the library takes no notice of labels.
    class_labels = None if network.class_embedding is None else class_labels
    takes(
        _fits(network, sample, timestep)
        and _has_text(network, encoder_hidden_states, added_cond_kwargs, count)
        and (class_labels is None) == (network.class_embedding is None)
        and (timestep_cond is None or config["time_cond_proj_dim"] is not None)
        and (residuals is None or len(residuals) == _stored_maps(network))
        and all(mask is None or mask.dim() in (2, 3) for mask in (attention_mask, encoder_attention_mask))
        and (encoder_attention_mask is None or encoder_hidden_states is not None or not network.takes_text())
    )
    added = _added(config["addition_embed_type"], encoder_hidden_states, added_cond_kwargs, count)
    for fuser, original in _fusers(network, module):
        fuser.enabled = original.enabled
    with _adapters_scaled(module, scale):
        result = network(
            sample,
            _as_tensor(timestep, sample),
            encoder_hidden_states,
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            encoder_attention_mask=encoder_attention_mask,
            added_cond_kwargs=added,
            down_block_additional_residuals=residuals,
            mid_block_additional_residual=mid_block_additional_residual,
            down_intrablock_additional_residuals=within or (),
            objects=objects,
        )
    return output(module, "UNet2DConditionOutput", result, return_dict)


def controlnet(
    network: ControlNet,
    module: Any,
    sample: Tensor,
    timestep: Tensor | float,
    encoder_hidden_states: Tensor,
    controlnet_cond: Tensor,
    conditioning_scale: float | Tensor = 1.0,
    class_labels: Tensor | None = None,
    timestep_cond: Tensor | None = None,
    attention_mask: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    guess_mode: bool = False,
    return_dict: bool = True,
) -> Any:
    scale, _ = _attention_kwargs(cross_attention_kwargs, gated=False)
    takes(timestep_cond is None and network.fits(controlnet_cond, sample))
    # Without class embeddings the library takes no notice of labels.
    class_labels = None if network.class_embedding is None else class_labels
    takes(
        _fits(network, sample, timestep)
        and isinstance(encoder_hidden_states, Tensor)
        and len(encoder_hidden_states) == len(sample)
        and (class_labels is None) == (network.class_embedding is None)
        and (attention_mask is None or attention_mask.dim() in (2, 3))
    )
    kind = network.config["addition_embed_type"]
    with _adapters_scaled(module, scale):
        down, middle = network(
            sample,
            _as_tensor(timestep, sample),
            encoder_hidden_states,
            controlnet_cond,
            conditioning_scale,
            class_labels=class_labels,
            attention_mask=attention_mask,
            added_cond_kwargs=_added(kind, encoder_hidden_states, added_cond_kwargs, len(sample)),
            guess_mode=guess_mode,
        )
    if not return_dict:
        return down, middle
    made = sys.modules[type(module).__module__].ControlNetOutput
    return made(down_block_res_samples=down, mid_block_res_sample=middle)


def _fits(network: UNet | ControlNet, sample: Tensor, timestep: Any) -> bool:
    if sample.dim() != 4 or sample.shape[1] != network.sample_channels():
        return False
    if not isinstance(timestep, Tensor):
        return isinstance(timestep, int | float)
    return timestep.dim() == 0 or (timestep.dim() == 1 and len(timestep) in (1, len(sample)))


def _stored_maps(network: UNet) -> int:
    return 1 + sum(map(stored_maps, network.down_blocks))  # type: ignore[arg-type]


def _attention_kwargs(given: Mapping[str, Any] | None, gated: bool) -> tuple[Any, Mapping[str, Tensor] | None]:
    """(the adapters' scale, GLIGEN's objects) out of cross_attention_kwargs. Raises Left where there is more in it."""
    known = dict(given or {})
    scale = known.pop("scale", 1.0)
    objects = known.pop("gligen", None) if gated else None
    plain_kwargs("cross_attention_kwargs", known)
    return scale, objects


@contextmanager
def _adapters_scaled(module: nn.Module, scale: Any) -> Iterator[None]:
    """Scales the module's adapters as the library does it around its own forward."""
    library = sys.modules["diffusers.utils"]
    if not library.USE_PEFT_BACKEND or (isinstance(scale, float | int) and scale == 1):
        yield
        return
    library.scale_lora_layers(module, scale)
    try:
        yield
    finally:
        library.unscale_lora_layers(module, scale)


def _fusers(network: UNet, module: nn.Module) -> Iterator[tuple[Fuser, Any]]:
    """GLIGEN's layers and the library's, which pipelines switch on and off from step to step."""
    if network.config["attention_type"] != "default":
        for path, inner in network.named_modules():
            if isinstance(inner, Fuser):
                yield inner, module.get_submodule(path)


def _has_text(network: UNet, text: Any, added: Mapping[str, Tensor] | None, count: int) -> bool:
    """Whether there is text for each sample, or what stands for it."""
    kind = network.config["encoder_hid_dim_type"]
    if kind in ("image_proj", "text_image_proj"):
        images = (added or {}).get("image_embeds")
        if images is None or len(images) != count:
            return False
        text = images if kind == "image_proj" and network.config["addition_embed_type"] != "text" else text
    if text is None:
        return not network.needs_text
    return isinstance(text, Tensor) and len(text) == count


def _added(
    kind: str | None, text: Tensor | None, given: Mapping[str, Tensor] | None, count: int
) -> Mapping[str, Tensor]:
    """What addition_embed_type needs, for each sample. Raises Left where something is missing."""
    added = dict(given or {})
    if kind == "text_image":
        added.setdefault("text_embeds", text)  # type: ignore[arg-type]
        takes(isinstance(added["text_embeds"], Tensor) and added["text_embeds"].dim() == 2)
    for name in ADDED[kind]:
        takes(isinstance(added.get(name), Tensor) and len(added[name]) == count)
    return added


def _as_tensor(timestep: Tensor | float, sample: Tensor) -> Tensor:
    if isinstance(timestep, Tensor):
        return timestep
    kind = torch.float64 if isinstance(timestep, float) else torch.int64
    return torch.tensor(timestep, dtype=kind, device=sample.device)


def freed(module: nn.Module) -> str | None:
    """FreeU leaves its four numbers on every block of the way up."""
    for block in module.up_blocks:  # type: ignore[union-attr]
        if all(vars(block).get(name) for name in ("s1", "s2", "b1", "b2")):
            return "FreeU is enabled"
    return None
