"""Building blocks of diffusers inside networks that fastdiff has none of its own for, on its operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff import ops
from fastdiff.models import known
from fastdiff.models.attention import to_map, to_tokens
from fastdiff.models.calls import Left, check
from fastdiff.models.context import Context
from fastdiff.models.fused import (
    Fused,
    convolve_doubled,
    convolved_onto,
    doubling_obstacle,
    is_foldable,
    leave,
    norm_obstacle,
    normed,
    unfit,
)
from fastdiff.models.leaf import is_plain
from fastdiff.models.transformer import add_and_norm
from fastdiff.ops.checks import MAX_HEAD_DIM

_MODELS = "diffusers.models."
_BLOCKS = {
    "ResnetBlock2D": _MODELS + "resnet",
    "Upsample2D": _MODELS + "upsampling",
    "Attention": _MODELS + "attention_processor",
    "BasicTransformerBlock": _MODELS + "attention",
}
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")
_SCORED = ("get_attention_scores", "head_to_batch_dim", "batch_to_head_dim")
"""Methods of Attention that AttnProcessor computes with."""


def is_block(name: str, module: nn.Module) -> bool:
    return known.is_library(type(module), _BLOCKS[name], name)


class _Block(Fused):
    """A class of diffusers; `fused` is asked only while the class has its own forward."""

    name: str

    @classmethod
    def proves(cls, module: nn.Module) -> bool:
        """Whether a module's forward may be replaced by this one."""
        return is_block(cls.name, module)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if not is_block(self.name, self.owner):
            self.parts.leave(f"the forward of {self.name} was replaced")
            return self.original(*args, **kwargs)
        return super().run(*args, **kwargs)

    def check_unfit(self, x: Any, *others: Any) -> None:
        recorded = torch.is_grad_enabled()
        inputs = [other for other in others if isinstance(other, Tensor)]
        leave(unfit(x, (*inputs, *self.owner.parameters()) if recorded else ()))


class FusedResnet(_Block):
    """shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + time)))), as `blocks.ResnetBlock` computes it."""

    name = "ResnetBlock2D"

    @classmethod
    def proves(cls, module: Any) -> bool:
        return super().proves(module) and _has_norms(module)

    def fused(self, input_tensor: Any, temb: Any = None, *more: Any, **options: Any) -> Any:
        block: Any = self.owner
        own = self.parts.rewrites
        check(own.group_norm_silu and not more and not options)
        self._check(block, input_tensor, temb)
        x, h = input_tensor, normed(block.norm1, input_tensor)
        folds = own.folded_bias and is_plain(block.conv1) and block.conv1.bias is not None
        if block.upsample is not None:
            x, h = block.upsample(x), self._doubled(block, h, bias=not folds)
        else:
            if block.downsample is not None:
                x, h = block.downsample(x), block.downsample(h)
            h = _convolve(block.conv1, h, bias=not folds)
        h = self._normed_with_time(block, h, temb, block.conv1.bias if folds else None)
        h = block.dropout(h)
        if block.conv_shortcut is not None:
            x = block.conv_shortcut(x)
        total = convolved_onto(x, block.conv2, h) if own.folded_residual else x + block.conv2(h)
        return _scaled(total, block.output_scale_factor)

    def _check(self, block: Any, x: Any, temb: Any) -> None:
        self.check_unfit(x, temb)
        if not _has_norms(block):
            raise Left("a ResnetBlock2D has another activation or norm, or a hook on them")
        leave(norm_obstacle(block.norm1, x))
        # The map in between has the convolution's dtype.
        norm2 = block.norm2.weight
        check(x.dim() == 4 and (norm2 is None or norm2.dtype == x.dtype))
        check(block.time_embedding_norm in ("default", "scale_shift"))
        if block.time_emb_proj is None:
            check(temb is None and block.time_embedding_norm == "default")
        else:
            check(type(temb) is Tensor and temb.dim() == 2 and len(temb) in (1, len(x)) and temb.dtype == x.dtype)

    def _doubled(self, block: Any, h: Tensor, *, bias: bool) -> Tensor:
        twice = is_block("Upsample2D", block.upsample) and known.is_bare(block.upsample) and _doubles(block.upsample)
        if (
            self.parts.rewrites.upsample_conv
            and twice
            and not block.upsample.use_conv
            and is_foldable(block.conv1)
            and doubling_obstacle(block.conv1, h) is None
        ):
            return convolve_doubled(block.conv1, h, self.kept, bias=bias)
        return _convolve(block.conv1, block.upsample(h), bias=bias)

    def _normed_with_time(self, block: Any, h: Tensor, temb: Any, bias: Tensor | None) -> Tensor:
        addend = bias if bias is None else bias.expand(len(h), -1)
        shifts = block.time_embedding_norm == "default"
        time = None
        if block.time_emb_proj is not None:
            time = block.time_emb_proj(temb if block.skip_time_act else block.nonlinearity(temb))
            if shifts:
                addend = (time if bias is None else time + bias).expand(len(h), -1)
        h = normed(block.norm2, h, silu=shifts, addend=addend)
        if shifts or time is None:
            return h
        scale, shift = time[:, :, None, None].chunk(2, dim=1)
        return F.silu(h * (1 + scale) + shift)


class FusedUpsample(_Block):
    """conv(nearest2x(x)) as one convolution of x."""

    name = "Upsample2D"

    @classmethod
    def proves(cls, module: Any) -> bool:
        return super().proves(module) and _doubles(module) and module.use_conv

    def fused(self, hidden_states: Any, output_size: Any = None, *more: Any, **options: Any) -> Any:
        layer: Any = self.owner
        x = hidden_states
        check(self.parts.rewrites.upsample_conv and not more and not options)
        check(layer.use_conv and _doubles(layer))
        check(type(x) is Tensor and x.dim() == 4)
        check(output_size is None or tuple(output_size) == (2 * x.shape[2], 2 * x.shape[3]))
        conv = layer.conv if layer.name == "conv" else layer.Conv2d_0
        if not is_foldable(conv):
            raise Left("an Upsample2D has another convolution, or a hook or an adapter on it")
        leave(doubling_obstacle(conv, x))
        return convolve_doubled(conv, x, self.kept)


class FusedAttention(_Block):
    """Attention of the processors AttnProcessor and AttnProcessor2_0 in one operator between the layers."""

    name = "Attention"

    def fused(
        self,
        hidden_states: Any,
        encoder_hidden_states: Any = None,
        attention_mask: Any = None,
        **options: Any,
    ) -> Any:
        attention: Any = self.owner
        temb = options.pop("temb", None)
        check(not any(value is not None for value in options.values()))
        x, source = hidden_states, encoder_hidden_states
        self.check_unfit(x, source, attention_mask, temb)
        modern = self._check(attention, x, source, attention_mask)
        if attention.spatial_norm is not None:
            x = attention.spatial_norm(x, temb)
        tokens = to_tokens(x) if x.dim() == 4 else x
        batch, length = tokens.shape[:2] if source is None else source.shape[:2]
        mask = attention_mask
        if mask is not None:
            mask = attention.prepare_attention_mask(mask, length, batch)
            mask = mask.view(batch, attention.heads, -1, mask.shape[-1])
        if attention.group_norm is not None:
            tokens = _normed_tokens(attention.group_norm, tokens)
        if source is None:
            source = tokens
        elif attention.norm_cross:
            source = attention.norm_encoder_hidden_states(source)
        projected = (attention.to_q(tokens), attention.to_k(source), attention.to_v(source))
        q, k, v = (each.unflatten(-1, (attention.heads, -1)).transpose(1, 2) for each in projected)
        if modern:
            q = q if attention.norm_q is None else attention.norm_q(q)
            k = k if attention.norm_k is None else attention.norm_k(k)
        joined = ops.attention(q, k, v, mask=mask, scale=None if modern else float(attention.scale))
        result = joined.transpose(1, 2).flatten(2)
        for layer in attention.to_out:
            result = layer(result)
        if hidden_states.dim() == 4:
            result = to_map(result, hidden_states)
        if attention.residual_connection:
            result = result + hidden_states
        return _scaled(result, attention.rescale_output_factor)

    def _check(self, attention: Any, x: Any, source: Any, mask: Any) -> bool:
        """Whether the processor is AttnProcessor2_0. Raises Left for another one and for what it would not take."""
        processor, home = type(attention.processor), _BLOCKS["Attention"]
        kind = next((each for each in _PROCESSORS if known.is_library(processor, home, each, "__call__")), None)
        if kind is None:
            raise Left(f"an Attention has the processor {processor.__name__}")
        modern = kind == "AttnProcessor2_0"
        if not modern and not all(_is_own_method(attention, name) for name in _SCORED):
            raise Left("a method of an Attention was replaced")
        check(x.dim() in (3, 4) and (source is None or (type(source) is Tensor and source.dim() == 3)))
        check(source is None or (len(source) == len(x) and source.dtype == x.dtype and source.shape[1] > 0))
        check(attention.to_k is not None and attention.to_v is not None and attention.to_out is not None)
        check(len(attention.to_out) == 2)
        # As many heads of keys and values as of queries.
        check(attention.inner_dim == attention.inner_kv_dim and attention.inner_dim % attention.heads == 0)
        check(attention.inner_dim // attention.heads <= MAX_HEAD_DIM)
        own = (torch.bool, x.dtype) if modern else (x.dtype,)
        check(mask is None or (type(mask) is Tensor and mask.dtype in own))
        return modern


class FusedTransformerBlock(_Block):
    """BasicTransformerBlock with plain LayerNorms, each residual being added where the next of them reads the sum."""

    name = "BasicTransformerBlock"

    @classmethod
    def proves(cls, module: Any) -> bool:
        return super().proves(module) and module.norm_type == "layer_norm"

    def fused(
        self,
        hidden_states: Any,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        timestep: Any = None,
        cross_attention_kwargs: Any = None,
        class_labels: Any = None,
        added_cond_kwargs: Any = None,
    ) -> Any:
        block: Any = self.owner
        check(self.parts.rewrites.add_layer_norm and block.norm_type == "layer_norm" and block._chunk_size is None)
        check(not cross_attention_kwargs)
        x = hidden_states
        self.check_unfit(x, encoder_hidden_states)
        check(x.dim() == 3 and all(_fits_norm(norm, x) for norm in (block.norm1, block.norm2, block.norm3)))
        placed = block.pos_embed if block.pos_embed is not None else lambda h: h
        context = Context(rewrites=self.parts.rewrites)
        first = encoder_hidden_states if block.only_cross_attention else None
        h = block.attn1(placed(block.norm1(x)), encoder_hidden_states=first, attention_mask=attention_mask)
        if block.attn2 is not None:
            n, x = add_and_norm(block.norm2, x, h, context)
            h = block.attn2(
                placed(n), encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
            )
        n, x = add_and_norm(block.norm3, x, h, context)
        return block.ff(n) + x


def _has_norms(block: Any) -> bool:
    """Whether a ResnetBlock2D has the norms and the activation that are one operator."""
    return (
        known.group_norm(block.norm1) == "own"
        and known.group_norm(block.norm2) == "own"
        and known.is_silu(block.nonlinearity)
    )


def _doubles(layer: Any) -> bool:
    """Whether an Upsample2D doubles its input, besides what its convolution does."""
    return layer.interpolate and layer.norm is None and not layer.use_conv_transpose


def _fits_norm(norm: Any, x: Tensor) -> bool:
    """Whether a norm is absent, or has the dtype that `add_and_norm` may be given."""
    return norm is None or (isinstance(norm, nn.LayerNorm) and (norm.weight is None or norm.weight.dtype == x.dtype))


def _is_own_method(module: nn.Module, name: str) -> bool:
    return name not in vars(module) and known.is_library(type(module), _BLOCKS["Attention"], "Attention", name)


def _convolve(conv: Any, x: Tensor, *, bias: bool) -> Tensor:
    y: Tensor = (
        conv(x) if bias else F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    )
    return y


def _normed_tokens(norm: Any, tokens: Tensor) -> Tensor:
    """The norm over the channels of tokens (B, L, C), which lie as a channels-last map of one column."""
    rows = tokens.transpose(1, 2)
    if known.group_norm(norm) == "own" and norm_obstacle(norm, rows) is None:
        return normed(norm, rows.unsqueeze(-1), silu=False).squeeze(-1).transpose(1, 2)
    normal: Tensor = norm(rows)
    return normal.transpose(1, 2)


def _scaled(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1.0 else x / factor


REPLACEMENTS: tuple[tuple[Callable[[nn.Module], bool], type[Fused]], ...] = tuple(
    (kind.proves, kind) for kind in (FusedResnet, FusedUpsample, FusedAttention, FusedTransformerBlock)
)
"""What proves that a module's forward may be replaced, and what replaces it."""
