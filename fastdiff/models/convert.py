"""The library's classes that a network of ours can stand for, and what their calls become.

The library itself is never imported: its classes are known by their names and modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.models.autoencoder import Decoder, Encoder, complete
from fastdiff.models.calls import Call, output, plain_kwargs, refuse, takes
from fastdiff.models.controlnet import ControlNet
from fastdiff.models.dit import DiT
from fastdiff.models.unet import UNet
from fastdiff.models.unet_calls import conditional_unet, controlnet, freed, plain_unet


@dataclass(frozen=True)
class Converter:
    """How a class of the library runs on a network of ours, or how the parts do that its methods call.

    home       the module that defines the class
    build      our network for its configuration, called on the meta device; InputError says what is not supported
    call       what runs in the place of its forward
    obstacle   why a call must be the library's own now, from what can be set on the module without a trace elsewhere
    parts      by their paths; each has the configuration of the whole
    """

    home: str
    build: Callable[[Mapping[str, Any]], nn.Module] | None = None
    call: Call | None = None
    obstacle: Callable[[nn.Module], str | None] = lambda module: None
    parts: Mapping[str, Converter] = field(default_factory=dict)


def _encode(network: Encoder, module: Any, sample: Tensor) -> Tensor:
    takes(sample.dim() == 4 and sample.shape[1] == network.in_channels)
    return network(sample)


def _decode(network: Decoder, module: Any, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
    refuse(latent_embeds=latent_embeds)
    takes(sample.dim() == 4 and sample.shape[1] == network.in_channels)
    return network(sample)


def _transformer(
    network: DiT,
    module: Any,
    hidden_states: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
) -> Any:
    plain_kwargs("cross_attention_kwargs", cross_attention_kwargs)
    takes(hidden_states.dim() == 4 and hidden_states.shape[1] == network.config["in_channels"])
    count, sides = len(hidden_states), [size // network.patch for size in hidden_states.shape[2:]]
    # The library gives every picture back as a square.
    takes(sides[0] == sides[1] > 0)
    takes(isinstance(timestep, Tensor) and timestep.dim() == 1 and len(timestep) in (1, count))
    takes(isinstance(class_labels, Tensor) and class_labels.shape == (count,) and class_labels.dtype == torch.int64)
    assert timestep is not None
    assert class_labels is not None
    result = network(hidden_states, timestep, class_labels)
    return output(module, "Transformer2DModelOutput", result, return_dict)


def _drops_labels(module: nn.Module) -> str | None:
    return "it is in training mode, where labels are dropped at random" if module.training else None


_VAE = "diffusers.models.autoencoders.vae"


def _autoencoder(config: Mapping[str, Any]) -> dict[str, Any]:
    return complete({**config, "_class_name": "AutoencoderKL"})


CONVERTERS: dict[str, Converter] = {
    "UNet2DModel": Converter(
        "diffusers.models.unets.unet_2d",
        lambda config: UNet(**{**config, "_class_name": "UNet2DModel"}),
        plain_unet,
    ),
    "UNet2DConditionModel": Converter(
        "diffusers.models.unets.unet_2d_condition",
        lambda config: UNet(**{**config, "_class_name": "UNet2DConditionModel"}),
        conditional_unet,
        freed,
    ),
    "AutoencoderKL": Converter(
        "diffusers.models.autoencoders.autoencoder_kl",
        parts={
            "encoder": Converter(_VAE, lambda config: Encoder(_autoencoder(config)), _encode),
            "decoder": Converter(_VAE, lambda config: Decoder(_autoencoder(config)), _decode),
        },
    ),
    "ControlNetModel": Converter(
        "diffusers.models.controlnets.controlnet",
        lambda config: ControlNet(**{**config, "_class_name": "ControlNetModel"}),
        controlnet,
    ),
    "DiTTransformer2DModel": Converter(
        "diffusers.models.transformers.dit_transformer_2d",
        lambda config: DiT(**{**config, "_class_name": "DiTTransformer2DModel"}),
        _transformer,
        _drops_labels,
    ),
}
"""By the name of the library's class."""


def converter(module: nn.Module) -> Converter | None:
    found = CONVERTERS.get(type(module).__name__)
    return found if found is not None and type(module).__module__ == found.home else None
