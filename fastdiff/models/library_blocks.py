"""Convolutional blocks of diffusers inside networks that fastdiff has none of its own for, on its operators."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastdiff.models import known
from fastdiff.models.calls import Left, check
from fastdiff.models.fused import (
    convolve_doubled,
    convolved_onto,
    doubling_obstacle,
    is_foldable,
    leave,
    norm_obstacle,
    normed,
)
from fastdiff.models.leaf import is_plain
from fastdiff.models.library import Block, is_block, scaled, taken

__all__ = ["FusedResnet", "FusedUpsample"]


class FusedResnet(Block):
    """shortcut(x) + conv2(dropout(silu(norm2(conv1(silu(norm1(x))) + time)))), as `blocks.ResnetBlock` computes it."""

    name = "ResnetBlock2D"

    @classmethod
    def proves(cls, module: Any) -> bool:
        return super().proves(module) and _has_norms(module)

    def fused(self, input_tensor: Any, temb: Any = None, *more: Any, **options: Any) -> Any:
        block: Any = self.owner
        own = self.parts.rewrites
        check(own.group_norm_silu)
        taken(not more and not options)
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
        return scaled(total, block.output_scale_factor)

    def _check(self, block: Any, x: Any, temb: Any) -> None:
        self.check_unfit(x, temb)
        if not _has_norms(block):
            raise Left("a ResnetBlock2D has another activation or norm, or a hook on them")
        leave(norm_obstacle(block.norm1, x))
        # The map in between has the convolution's dtype.
        norm2 = block.norm2.weight
        taken(x.dim() == 4 and (norm2 is None or norm2.dtype == x.dtype))
        kind = block.time_embedding_norm
        if block.time_emb_proj is None:
            # Under any other name there is no time, whatever is given.
            taken(kind not in ("default", "scale_shift") or (kind == "default" and temb is None))
        else:
            taken(kind in ("default", "scale_shift") and type(temb) is Tensor and temb.dim() == 2)
            taken(len(temb) in (1, len(x)) and temb.dtype == x.dtype)

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
        shifts = block.time_embedding_norm != "scale_shift"
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


class FusedUpsample(Block):
    """conv(nearest2x(x)) as one convolution of x."""

    name = "Upsample2D"

    @classmethod
    def proves(cls, module: Any) -> bool:
        return super().proves(module) and _doubles(module) and module.use_conv

    def fused(self, hidden_states: Any, output_size: Any = None, *more: Any, **options: Any) -> Any:
        layer: Any = self.owner
        x = hidden_states
        check(self.parts.rewrites.upsample_conv)
        taken(not more and not options and type(x) is Tensor and x.dim() == 4)
        if output_size is not None and tuple(output_size) != (2 * x.shape[2], 2 * x.shape[3]):
            raise Left("an Upsample2D was asked for a size that is not twice its input's")
        if not (layer.use_conv and _doubles(layer)):
            raise Left("an Upsample2D upsamples in another way")
        conv = layer.conv if layer.name == "conv" else layer.Conv2d_0
        if not is_foldable(conv):
            raise Left("an Upsample2D has another convolution, or a hook or an adapter on it")
        leave(doubling_obstacle(conv, x))
        return convolve_doubled(conv, x, self.kept)


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


def _convolve(conv: Any, x: Tensor, *, bias: bool) -> Tensor:
    y: Tensor = (
        conv(x) if bias else F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    )
    return y
