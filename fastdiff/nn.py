"""The fused layers as modules, for any network. Their parameters are named as diffusers names them.

Each can be made from the modules that it stands in for, and then shares their parameters: what is loaded into the one
is loaded into the other. Input, parameters and result have one dtype: float32, float16 or bfloat16; a norm's parameters
may be float32 with any input. Where a gradient is recorded the operator's reference runs, which is plain PyTorch and
differentiable, unless `fastdiff.use_backend` demands another.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import config, ops
from fastdiff.errors import InputError
from fastdiff.ops.checks import MAX_HEAD_DIM

__all__ = ["GEGLU", "Attention", "GroupNormSiLU"]


class GroupNormSiLU(nn.Module):
    """silu(group_norm(x + addend[n, c] + residual)), or without the silu: `fastdiff.ops.group_norm_silu`.

    x: (N, C, *spatial), contiguous or channels-last, which the result keeps. Parameters: weight, bias (C,), as in
    torch.nn.GroupNorm; None without affine.
    """

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        groups: int,
        channels: int,
        *,
        eps: float = 1e-5,
        silu: bool = True,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise InputError(f"GroupNormSiLU: channels={channels} is not divisible by groups={groups}")
        self.groups, self.channels, self.eps, self.silu = groups, channels, eps, silu
        made = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.ones(channels, **made)) if affine else None  # type: ignore[arg-type]
        self.bias = nn.Parameter(torch.zeros(channels, **made)) if affine else None  # type: ignore[arg-type]

    @classmethod
    def from_modules(cls, norm: nn.GroupNorm, activation: nn.SiLU | None = None) -> Self:
        """activation(norm(x)) as one layer, with the norm's own parameters; without an activation, norm(x).

        Errors: InputError for anything but a torch.nn.GroupNorm and a torch.nn.SiLU.
        """
        for name, module, expected in (("norm", norm, nn.GroupNorm), ("activation", activation, nn.SiLU)):
            if type(module) is not expected and (module is not None or name == "norm"):
                raise InputError(
                    f"GroupNormSiLU.from_modules: {name} is {_kind(module)}; expected torch.nn.{expected.__name__}; "
                    "keep the modules that they are"
                )
        with torch.device("meta"):
            made = cls(norm.num_groups, norm.num_channels, eps=norm.eps, silu=activation is not None)
        made.weight, made.bias = norm.weight, norm.bias
        return made.train(norm.training)

    def forward(
        self, x: Tensor, *, addend: Tensor | None = None, residual: Tensor | None = None, return_sum: bool = False
    ) -> Any:
        with _differentiable("group_norm_silu", x, self.weight, self.bias, addend, residual):
            return ops.group_norm_silu(
                x,
                self.groups,
                self.weight,
                self.bias,
                eps=self.eps,
                silu=self.silu,
                addend=addend,
                residual=residual,
                return_sum=return_sum,
            )

    def extra_repr(self) -> str:
        return f"{self.groups}, {self.channels}, eps={self.eps}, silu={self.silu}"


class Attention(nn.Module):
    """W_out softmax(q k^T / sqrt(head_dim) + mask) v with q = W_q x and k, v = W_k, W_v of the context.

    Called as diffusers' attention is: x = hidden_states (B, L, channels); context = encoder_hidden_states
    (B, S, context_channels), or None for self-attention; mask = attention_mask, bool (True = attend) or floating
    (added), broadcastable to (B, heads, L, S), or one of (B, S), (B, 1 or L, S), (B * heads, 1 or L, S). Result
    (B, L, channels).
    bias: whether W_q, W_k and W_v have one; W_out always has. Source: Vaswani et al. 2017, section 3.2.2.
    """

    score_scale: float | None = None
    """What the scores are multiplied by; None stands for 1 / sqrt(head_dim)."""

    def __init__(
        self,
        channels: int,
        *,
        heads: int,
        head_dim: int,
        context_channels: int | None = None,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = heads * head_dim
        source = channels if context_channels is None else context_channels
        # The operator stops at MAX_HEAD_DIM; one head over 512 channels occurs in early pixel models. Both accumulate
        # scores and products in float32, so that diffusers' upcast_attention and upcast_softmax have nothing to add.
        self._attend = ops.attention if head_dim <= MAX_HEAD_DIM else _plain_attention
        self.heads = heads
        self.to_q = nn.Linear(channels, inner, bias=bias, device=device, dtype=dtype)
        self.to_k = nn.Linear(source, inner, bias=bias, device=device, dtype=dtype)
        self.to_v = nn.Linear(source, inner, bias=bias, device=device, dtype=dtype)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels, device=device, dtype=dtype)])

    @classmethod
    def from_attention(cls, module: nn.Module) -> Self:
        """The function of a diffusers Attention, on its own layers: also where they are adapters (LoRA).

        It takes the standard processors (AttnProcessor, AttnProcessor2_0), any number of heads, biases, cross-attention
        and the upcast options. Errors: InputError that names an option which is not supported (norms, grouped heads,
        added projections, residual connections ...) or a part that is missing.
        """
        _check_attention(module)
        theirs: Any = module
        with torch.device("meta"):
            made = cls(
                theirs.to_q.in_features,
                heads=theirs.heads,
                head_dim=theirs.to_q.out_features // theirs.heads,
                context_channels=theirs.to_k.in_features,
            )
        for name in ("to_q", "to_k", "to_v", "to_out"):
            setattr(made, name, getattr(module, name))
        if _kind(module.processor) == "AttnProcessor":  # the other one does not look at it
            made.score_scale = float(theirs.scale)
        return made.train(module.training)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if hidden_states.dim() != 3:
            raise InputError(f"Attention: hidden_states has shape {tuple(hidden_states.shape)}; expected (B, L, C)")
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return self.attend(self.to_q(hidden_states), self.to_k(source), self.to_v(source), attention_mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The result for projections q (B, L, heads * head_dim) and k, v (B, S, heads * head_dim), of any strides."""
        joined = self.joined(q, k, v, mask)
        for layer in self.to_out:
            joined = layer(joined)
        return joined

    def joined(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The heads' results side by side, (B, L, heads * head_dim): what `attend` projects."""
        split = (projected.unflatten(-1, (self.heads, -1)).transpose(1, 2) for projected in (q, k, v))
        mask = _per_head(mask, len(q))
        with _differentiable("attention", q, k, v, mask):
            out: Tensor = self._attend(*split, mask=mask, scale=self.score_scale)
        return out.transpose(1, 2).flatten(2)


class GEGLU(nn.Module):
    """a * gelu(b) with [a, b] = W x + bias; (..., channels) -> (..., hidden): `fastdiff.ops.geglu`.

    Source: Shazeer, "GLU Variants Improve Transformer", 2020.
    """

    def __init__(
        self,
        channels: int,
        hidden: int,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * hidden, bias=bias, device=device, dtype=dtype)

    @classmethod
    def from_module(cls, module: nn.Module) -> Self:
        """The function of a diffusers GEGLU, or of another class of that name with a layer `proj`, on its own layer.

        Errors: InputError for a module of another name or without that layer.
        """
        proj = getattr(module, "proj", None)
        if _kind(module) != "GEGLU" or not isinstance(proj, nn.Module):
            raise InputError(
                f"GEGLU.from_module: module is {_kind(module)}; expected a GEGLU with a layer proj; keep it as it is"
            )
        with torch.device("meta"):
            made = cls(1, 1)
        made.proj = proj  # type: ignore[assignment]
        return made.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.proj(x)
        with _differentiable("geglu", projected):
            return ops.geglu(projected)


_PLAIN_OPTIONS: dict[str, Any] = {
    "group_norm": None,
    "spatial_norm": None,
    "norm_q": None,
    "norm_k": None,
    "norm_cross": None,
    "added_kv_proj_dim": None,
    "residual_connection": False,
    "rescale_output_factor": 1.0,
    "is_causal": False,
    "fused_projections": False,
    "pre_only": False,
}


def _check_attention(module: Any) -> None:
    """That `Attention.from_attention` can say what this module does."""
    here = "Attention.from_attention"
    for name in ("to_q", "to_k", "to_v", "to_out", "heads", "processor"):
        if getattr(module, name, None) is None:
            raise InputError(f"{here}: module is {_kind(module)}, without {name}; expected diffusers' Attention")
    for name, expected in _PLAIN_OPTIONS.items():
        value = getattr(module, name, expected)
        if value is not expected and value != expected:
            shown = _kind(value) if isinstance(value, nn.Module) else repr(value)
            raise InputError(f"{here}: {name} is {shown}; expected {expected!r}; keep the module that it is")
    processor = _kind(module.processor)
    if processor not in ("AttnProcessor", "AttnProcessor2_0"):
        raise InputError(
            f"{here}: the processor is {processor}; expected AttnProcessor or AttnProcessor2_0; keep the module"
        )
    sizes = [getattr(module, name).out_features for name in ("to_q", "to_k", "to_v")]
    if len(set(sizes)) > 1 or sizes[0] % module.heads:
        raise InputError(
            f"{here}: to_q, to_k and to_v give {sizes} channels; expected equal multiples of heads={module.heads}"
        )


def _differentiable(operator: str, *tensors: Tensor | None) -> AbstractContextManager[None]:
    """The operator's reference where a gradient is recorded and nobody demanded a backend."""
    recorded = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if recorded and config.forced_backend(operator) is None:
        return config.use_backend({operator: "reference"})
    return nullcontext()


def _kind(value: object) -> str:
    return type(value).__name__


def _per_head(mask: Tensor | None, batch: int) -> Tensor | None:
    """A mask in any of its forms as one that broadcasts to (B, heads, L, S)."""
    if mask is None or mask.dim() == 4:
        return mask
    if mask.dim() == 2:
        return mask[:, None, None]
    return mask[:, None] if len(mask) in (1, batch) else mask.unflatten(0, (batch, -1))


def _plain_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
