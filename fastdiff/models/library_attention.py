"""Attention and transformer blocks of diffusers inside networks that fastdiff has none of its own for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.models import known
from fastdiff.models.attention import to_map, to_tokens
from fastdiff.models.calls import Left, check
from fastdiff.models.context import Context
from fastdiff.models.fused import norm_obstacle, normed
from fastdiff.models.library import HOMES, Block, scaled, taken
from fastdiff.models.transformer import add_and_norm
from fastdiff.ops.checks import MAX_HEAD_DIM

__all__ = ["FusedAttention", "FusedTransformerBlock"]

_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")
_SCORED = ("get_attention_scores", "head_to_batch_dim", "batch_to_head_dim")
"""Methods of Attention that AttnProcessor computes with."""


class FusedAttention(Block):
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
        taken(not any(value is not None for value in options.values()))
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
        return scaled(result, attention.rescale_output_factor)

    def _check(self, attention: Any, x: Any, source: Any, mask: Any) -> bool:
        """Whether the processor is AttnProcessor2_0. Raises Left for another one and for what it would not take."""
        processor, home = type(attention.processor), HOMES["Attention"]
        kind = next((each for each in _PROCESSORS if known.is_library(processor, home, each, "__call__")), None)
        if kind is None:
            raise Left(f"an Attention has the processor {processor.__name__}")
        modern = kind == "AttnProcessor2_0"
        if not modern and not all(_is_own_method(attention, name) for name in _SCORED):
            raise Left("a method of an Attention was replaced")
        taken(x.dim() in (3, 4) and (source is None or (type(source) is Tensor and source.dim() == 3)))
        taken(source is None or (len(source) == len(x) and source.dtype == x.dtype and source.shape[1] > 0))
        own = (torch.bool, x.dtype) if modern else (x.dtype,)
        taken(mask is None or (type(mask) is Tensor and mask.dtype in own))
        if attention.to_k is None or attention.to_v is None or len(attention.to_out or ()) != 2:
            raise Left("an Attention has other projections")
        if attention.inner_dim != attention.inner_kv_dim or attention.inner_dim % attention.heads != 0:
            raise Left("an Attention has other heads of keys and values than of queries")
        if attention.inner_dim // attention.heads > MAX_HEAD_DIM:
            raise Left(f"an Attention has heads of more than {MAX_HEAD_DIM} channels")
        return modern


class FusedTransformerBlock(Block):
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
        check(self.parts.rewrites.add_layer_norm)
        if block.norm_type != "layer_norm":
            raise Left("a BasicTransformerBlock has other norms")
        if block._chunk_size is not None:
            raise Left("a BasicTransformerBlock feeds forward in chunks")
        taken(not cross_attention_kwargs)
        x = hidden_states
        self.check_unfit(x, encoder_hidden_states)
        taken(x.dim() == 3 and all(_fits_norm(norm, x) for norm in (block.norm1, block.norm2, block.norm3)))
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


def _fits_norm(norm: Any, x: Tensor) -> bool:
    """Whether a norm is absent, or has the dtype that `add_and_norm` may be given."""
    return norm is None or (isinstance(norm, nn.LayerNorm) and (norm.weight is None or norm.weight.dtype == x.dtype))


def _is_own_method(module: nn.Module, name: str) -> bool:
    return name not in vars(module) and known.is_library(type(module), HOMES["Attention"], "Attention", name)


def _normed_tokens(norm: Any, tokens: Tensor) -> Tensor:
    """The norm over the channels of tokens (B, L, C), which lie as a channels-last map of one column."""
    rows = tokens.transpose(1, 2)
    if known.group_norm(norm) == "own" and norm_obstacle(norm, rows) is None:
        return normed(norm, rows.unsqueeze(-1), silu=False).squeeze(-1).transpose(1, 2)
    normal: Tensor = norm(rows)
    return normal.transpose(1, 2)
