"""The networks that can be profiled, and calls of them with made-up inputs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import schedules
from fastdiff.errors import InputError
from fastdiff.models import AutoencoderKL, UNet, load_autoencoder, load_model
from fastdiff.models.config import spread

__all__ = ["NETWORKS", "Layout", "Step", "find"]

TIMES, INDEX, WORDS = 50, 25, 77


@dataclass(frozen=True)
class Layout:
    """A network of diffusers' by its configuration. shape: of the input that it is called with if nobody says more."""

    kind: str
    config: Mapping[str, Any]
    shape: tuple[int, ...]
    text: int = 0


NETWORKS = {
    "cifar": Layout(
        "UNet2DModel",
        {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": None,
            "norm_eps": 1e-6,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
        },
        (4, 3, 32, 32),
    ),
    "sd15": Layout("UNet2DConditionModel", {"cross_attention_dim": 768}, (2, 4, 32, 32), text=768),
    "decoder": Layout(
        "AutoencoderKL",
        {
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "norm_num_groups": 32,
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
        },
        (1, 4, 32, 32),
    ),
}
"""The U-Net of DDPM for CIFAR-10 (Ho et al. 2020), and the U-Net of Stable Diffusion 1.5 and the decoder of its
autoencoder, as diffusers configures them; with random weights."""


@dataclass(frozen=True)
class Step:
    """A network and its input. call(): one step of ours, or the network's part of it."""

    network: Any
    x: Tensor
    given: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.part(self.network).parameters())

    def part(self, network: Any) -> nn.Module:
        """What is called: of an autoencoder its decoder."""
        called: nn.Module = network.decoder if hasattr(network, "decoder") else network
        return called

    def call(self) -> Callable[[], Any]:
        return self._call(self.network)

    def library(self) -> Callable[[], Any]:
        """The same step of diffusers' own class, with the same weights.

        Errors: InputError where diffusers is not installed.
        """
        if find_spec("diffusers") is None:
            raise InputError("diffusers: expected the library beside fastdiff, which is not installed: pip install it")
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        config = {key: value for key, value in self.network.config.items() if not key.startswith("_")}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            made = getattr(diffusers, self.network.config["_class_name"])(**config)
        made.load_state_dict(self.network.state_dict())
        return self._call(made.to(self.x.dtype).eval().requires_grad_(False))

    def _call(self, network: Any) -> Callable[[], Any]:
        part = self.part(network)
        if part is not network:
            return lambda: part(self.x)
        # As in a pipeline's run, whose times networks remember.
        times = torch.arange(0, 20 * TIMES, 20)
        return lambda: part(self.x, times[INDEX], **self.given)


def find(model: str, *, batch: int | None = None, size: int | None = None, dtype: torch.dtype = torch.float32) -> Step:
    """A step of the network called `model`: a name of NETWORKS, or what `fastdiff.load_model` or `load_autoencoder`
    takes.

    batch: samples in a call, by default the layout's, 1 for other models. size: height and width of the input, of
    latents where the network has them; by default the network's own.

    Errors: InputError for a number below 1, a network without a size, and one with conditions that are not made up
    here; CheckpointError as `load_model`.
    """
    for name, value in (("batch", batch), ("size", size)):
        if value is not None and value < 1:
            raise InputError(f"{name}: expected a positive whole number, got {value}")
    network, shape = _made(NETWORKS[model]) if model in NETWORKS else _loaded(model)
    samples, channels, *sides = shape
    sides = [size, size] if size is not None else sides
    if not sides:
        raise InputError(f"size: expected a number of pixels, since {model} does not say its own")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch or samples, channels, *sides, generator=generator)
    given = {} if isinstance(network, AutoencoderKL) else _conditions(network.config, len(x), generator)
    network.to(dtype)
    return Step(network, x.to(dtype), {name: _cast(value, dtype) for name, value in given.items()})


def _made(layout: Layout) -> tuple[UNet | AutoencoderKL, tuple[int, ...]]:
    kind: type[UNet | AutoencoderKL] = AutoencoderKL if layout.kind == "AutoencoderKL" else UNet
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(**layout.config).eval().requires_grad_(False), layout.shape


def _loaded(model: str) -> tuple[UNet | AutoencoderKL, tuple[int, ...]]:
    if _is_autoencoder(Path(model)):
        network = load_autoencoder(model)
        halvings = len(network.config["block_out_channels"]) - 1
        sides = [side // 2**halvings for side in spread(network.config["sample_size"], 2)]
        return network, (1, network.config["latent_channels"], *sides)
    # Of no account here, but a folder that has none would be warned of.
    loaded = load_model(model, schedule=schedules.scaled_linear(1000), prediction="epsilon")
    return loaded.network, (1, *(loaded.sample_shape or (loaded.network.config["in_channels"],)))


def _is_autoencoder(folder: Path) -> bool:
    try:
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"] == "AutoencoderKL"
    except (OSError, ValueError, KeyError, TypeError):
        return False  # `load_model` says what is wrong with it


def _conditions(config: Mapping[str, Any], samples: int, generator: torch.Generator) -> dict[str, Any]:
    """What the network is called with beside x and the time."""
    for key in ("class_embed_type", "encoder_hid_dim_type"):
        if config.get(key) is not None:
            raise InputError(
                f"model: a network with {key}={config[key]!r} cannot be profiled: its inputs are not known"
            )
    given: dict[str, Any] = {}
    width = config.get("cross_attention_dim")
    if width is not None:
        width = max(width) if isinstance(width, (list, tuple)) else width
        given["encoder_hidden_states"] = torch.randn(samples, WORDS, width, generator=generator)
    if config.get("num_class_embeds") is not None:
        given["class_labels"] = torch.zeros(samples, dtype=torch.int64)
    if config.get("addition_embed_type") == "text_time":
        size = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        text = torch.randn(samples, size, generator=generator)
        given["added_cond_kwargs"] = {"text_embeds": text, "time_ids": torch.ones(samples, 6)}
    elif config.get("addition_embed_type") is not None:
        kind = config["addition_embed_type"]
        raise InputError(
            f"model: a network with addition_embed_type={kind!r} cannot be profiled: its inputs are not known"
        )
    return given


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Mapping):
        return {name: _cast(each, dtype) for name, each in value.items()}
    return value.to(dtype) if value.is_floating_point() else value
