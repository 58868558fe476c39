"""The diffusion transformer: patches of a latent picture as tokens, with norms that the time and the class modulate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.errors import InputError
from fastdiff.models import config as configuration
from fastdiff.models.arena import in_arena
from fastdiff.models.attention import PackedAttention
from fastdiff.models.caches import RunCache
from fastdiff.models.context import Context
from fastdiff.models.embeddings import Sinusoids
from fastdiff.models.leaf import is_plain
from fastdiff.models.modulation import FIXED_EPS, TIME_FEATURES, AdaptiveNorm, Pending, modulated
from fastdiff.models.packs import Packs
from fastdiff.models.patches import PatchEmbedding
from fastdiff.models.prepacked import apply
from fastdiff.models.rewrites import Rewrites
from fastdiff.models.times import locate

__all__ = ["DiT", "complete"]

LAYOUT = "DiTTransformer2DModel"

TABLE_BYTES = 1 << 28
"""The most memory that the modulations of a run may take; a longer run computes them step by step."""

_DEFAULTS: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": None,
    "num_layers": 28,
    "dropout": 0.0,
    "norm_num_groups": 32,
    "attention_bias": True,
    "sample_size": 32,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "upcast_attention": False,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}

_APPROXIMATIONS = {"gelu": "none", "gelu-approximate": "tanh"}
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "activation_fn": tuple(_APPROXIMATIONS),
    "norm_type": ("ada_norm_zero",),
}
_COUNTS = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "num_layers",
    "sample_size",
    "patch_size",
    "num_embeds_ada_norm",
)


def complete(given: Mapping[str, Any]) -> dict[str, Any]:
    """The whole configuration, plain data that JSON can hold.

    Errors: InputError that names the key, its value, and what is supported.
    """
    layout = given.get("_class_name") or LAYOUT
    if layout != LAYOUT:
        raise InputError(f"DiT: _class_name={layout!r} is not supported; expected {LAYOUT!r}")
    config = configuration.merge("DiT", LAYOUT, _DEFAULTS, given)
    configuration.check_supported("DiT", config, _SUPPORTED)
    for key in _COUNTS:
        if not isinstance(config[key], int) or config[key] < 1:
            raise InputError(f"DiT: {key}={config[key]!r}; expected a whole number from 1")
    channels = config["num_attention_heads"] * config["attention_head_dim"]
    if channels % 4:
        raise InputError(f"DiT: num_attention_heads * attention_head_dim = {channels}; expected a multiple of 4")
    if config["sample_size"] < config["patch_size"]:
        raise InputError(f"DiT: sample_size={config['sample_size']} is less than patch_size={config['patch_size']}")
    return {"_class_name": LAYOUT, **config}


class DiT(nn.Module):
    """DiT(**config)(hidden_states, timestep, class_labels) -> a tensor (N, out_channels, H', W').

    The configuration's keys, their defaults and the parameters' names are those of diffusers 0.42's
    DiTTransformer2DModel; `config` holds all of them. To train it, call it inside `fastdiff.use_backend("reference")`,
    where the operators have gradients; in training, labels give way at random to that of no class.

    Errors: InputError for a key, value or combination that is not supported, named in the message.
    Source: Peebles and Xie, "Scalable Diffusion Models with Transformers", 2023, section 3.2 (adaLN-Zero).
    """

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = c = complete(config)
        self.rewrites = Rewrites()
        self.packs = Packs()
        self.patch = c["patch_size"]
        self.out_channels = c["out_channels"] or c["in_channels"]
        channels = c["num_attention_heads"] * c["attention_head_dim"]
        self.pos_embed = PatchEmbedding(c["in_channels"], channels, patch=self.patch, size=c["sample_size"])
        self.time_proj = Sinusoids(TIME_FEATURES, flip=True, shift=1)
        self.transformer_blocks = nn.ModuleList(DiTBlock(channels, c) for _ in range(c["num_layers"]))
        self.norm_out = nn.LayerNorm(channels, eps=FIXED_EPS, elementwise_affine=False)
        self.proj_out_1 = nn.Linear(channels, 2 * channels)
        self.proj_out_2 = nn.Linear(channels, self.patch**2 * self.out_channels)
        self._runs = RunCache(size=2)

    @in_arena
    def forward(self, hidden_states: Tensor, timestep: Tensor | float | int, class_labels: Tensor) -> Tensor:
        """The network's output for noisy latents.

        hidden_states: (N, in_channels, H, W), any H and W from patch_size; what is left over of a last patch is not
        read, so that H' and W' are H and W rounded down to patches. timestep: a number, or (N,). class_labels: int64
        (N,), below num_embeds_ada_norm, or equal to it for no class.
        """
        t = self._check_input(hidden_states, timestep, class_labels)
        context = Context(rewrites=self.rewrites, packs=self.packs.ready(hidden_states, self.rewrites, self))
        x = self.pos_embed(hidden_states)
        *modulations, last = self._modulations(t, class_labels, x.dtype)
        pending: Pending | None = None
        for block, modulation in zip(self.transformer_blocks, modulations, strict=True):
            x, pending = block(x, pending, modulation, context)
        shift, scale = last.chunk(2, dim=-1)
        h, _ = modulated(self.norm_out, x, pending, shift, scale, context)
        tokens = self.proj_out_2(h)
        rows, columns = (size // self.patch for size in hidden_states.shape[2:])
        patches = tokens.unflatten(2, (self.patch, self.patch, self.out_channels)).unflatten(1, (rows, columns))
        out: Tensor = patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return out

    def _check_input(self, x: Tensor, timestep: Tensor | float | int, labels: Tensor) -> Tensor:
        """The times (N,), after the checks that need no look at the data."""
        channels = self.config["in_channels"]
        if x.dim() != 4 or x.shape[1] != channels or min(x.shape[2:]) < self.patch:
            raise InputError(
                f"DiT: hidden_states has shape {tuple(x.shape)}; "
                f"expected (N, {channels}, H, W) with H and W from {self.patch}"
            )
        t = torch.as_tensor(timestep, device=x.device)
        if t.dim() > 1 or t.numel() not in (1, len(x)):
            raise InputError(f"DiT: timestep has shape {tuple(t.shape)}; expected a number or ({len(x)},)")
        if labels.shape != (len(x),) or labels.dtype not in (torch.int64, torch.int32):
            raise InputError(
                f"DiT: class_labels has shape {tuple(labels.shape)} and {labels.dtype}; "
                f"expected ({len(x)},) and torch.int64"
            )
        return t.expand(len(x))

    def _blocks(self) -> list[DiTBlock]:
        return list(self.transformer_blocks)  # type: ignore[arg-type]

    def _modulations(self, t: Tensor, labels: Tensor, dtype: torch.dtype) -> list[Tensor]:
        """What each block's norms read (N, 6 channels), and at the end what the last norm reads (N, 2 channels)."""
        if not self.rewrites.modulation_cache:
            norms = [block.norm1 for block in self._blocks()]
            first = norms[0].emb(self._features(t, dtype), labels)
            return [
                *(norm.modulation(self._features(t, dtype), labels) for norm in norms),
                self.proj_out_1(F.silu(first)),
            ]
        found = self._table(t, labels, dtype)
        if found is None:
            return self._modulate(self._features(t, dtype), labels)
        table, step = found
        return [each[step] for each in table]

    def _features(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        features: Tensor = self.time_proj(t)
        return features.to(dtype)

    def _modulate(self, features: Tensor, labels: Tensor) -> list[Tensor]:
        """As `_modulations`, for the features of times that broadcast with the labels."""
        norms = [block.norm1 for block in self._blocks()]
        embedded = [F.silu(norm.emb(features, labels)) for norm in norms]
        return [
            *(norm.linear(each) for norm, each in zip(norms, embedded, strict=True)),
            self.proj_out_1(embedded[0]),
        ]

    def _table(self, t: Tensor, labels: Tensor, dtype: torch.dtype) -> tuple[list[Tensor], int] | None:
        """The modulations of all steps (steps, N, ...) and which of them this is; None where there is no table."""
        place = None if torch.compiler.is_compiling() or self.training else locate(t)
        if place is None:
            return None
        times, step = place
        channels = (6 * len(self.transformer_blocks) + 2) * self.norm_out.normalized_shape[0]
        weights = self._modulation_weights()
        if weights is None or len(times) * len(labels) * channels * dtype.itemsize > TABLE_BYTES:
            return None
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return None
        kind = labels.device.type
        key = (dtype, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
        table = self._runs.table(
            key, [times, labels, *weights], lambda: self._modulate(self._features(times, dtype)[:, None], labels)
        )
        return None if table is None else (table, step)

    def _modulation_weights(self) -> list[Tensor] | None:
        """All that the modulations are made of besides time and class; None where a layer is not plain."""
        if not is_plain(self.proj_out_1):
            return None
        found = [self.proj_out_1.weight, self.proj_out_1.bias]
        for block in self._blocks():
            weights = block.norm1.weights()
            if weights is None:
                return None
            found += weights
        return found


class DiTBlock(nn.Module):
    """x += gate1 * attention(modulate1(norm x)); x += gate2 * feed-forward(modulate2(norm3 x)).

    modulate_i(h) = h (1 + scale_i) + shift_i; modulation (N, 6 channels) is the shift, scale and gate of 1, then of 2.
    forward(x, pending, ...) takes and gives a sum that is still to be made: the norm that reads it next makes it.
    """

    def __init__(self, channels: int, config: Mapping[str, Any]) -> None:
        super().__init__()
        heads, head_dim, dropout = config["num_attention_heads"], config["attention_head_dim"], config["dropout"]
        self.norm1 = AdaptiveNorm(channels, classes=config["num_embeds_ada_norm"])
        self.attn1 = PackedAttention(channels, heads=heads, head_dim=head_dim, bias=config["attention_bias"])
        self.attn1.to_out.append(nn.Dropout(dropout))
        affine = config["norm_elementwise_affine"]
        self.norm3 = nn.LayerNorm(channels, eps=config["norm_eps"], elementwise_affine=affine)
        self.ff = FeedForward(channels, approximate=_APPROXIMATIONS[config["activation_fn"]], dropout=dropout)

    def forward(
        self, x: Tensor, pending: Pending | None, modulation: Tensor, context: Context
    ) -> tuple[Tensor, Pending]:
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
        h, x = modulated(self.norm1.norm, x, pending, shift1, scale1, context)
        h, x = modulated(self.norm3, x, Pending(gate1, self.attn1(h, context)), shift2, scale2, context)
        return x, Pending(gate2, self.ff(h, context))


class FeedForward(nn.Module):
    """W2 dropout(gelu(W1 x + b1)) + b2, with four times as many hidden channels."""

    def __init__(self, channels: int, *, approximate: str, dropout: float) -> None:
        super().__init__()
        hidden = 4 * channels
        self.net = nn.Sequential(
            ProjectedGELU(channels, hidden, approximate=approximate), nn.Dropout(dropout), nn.Linear(hidden, channels)
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        first, dropout, last = self.net
        return apply(last, dropout(first(x, context)), context.packs)


class ProjectedGELU(nn.Module):
    """gelu(W x + b)."""

    def __init__(self, channels: int, hidden: int, *, approximate: str) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, hidden)
        self.approximate = approximate

    def forward(self, x: Tensor, context: Context) -> Tensor:
        return F.gelu(apply(self.proj, x, context.packs), approximate=self.approximate)
