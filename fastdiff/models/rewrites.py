"""The exact rewrites of a network: each a named step that leaves the function as it is and does less work for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields

from fastdiff.errors import InputError


def _rewrite(what: str, *needs: str) -> bool:
    """needs: the rewrites without which this one changes nothing."""
    return field(default=True, metadata={"what": what, "needs": needs})


@dataclass(frozen=True)
class Rewrites:
    """Which rewrites are on; `Rewrites()` has all of them."""

    unit_scale: bool = _rewrite("no division by a scale of 1")
    channels_last: bool = _rewrite("feature maps lie channels-last from the first convolution to the last")
    group_norm_silu: bool = _rewrite("GroupNorm and the SiLU after it are one operator")
    geglu: bool = _rewrite("a * gelu(b) is one operator")
    add_layer_norm: bool = _rewrite("a residual is added by its own product, or where the next LayerNorm reads it")
    upsample_conv: bool = _rewrite("doubling a map and convolving it is one convolution of the small map")
    text_cache: bool = _rewrite("what is made of a text, or of a picture to go by, alone is computed once for a run")
    time_cache: bool = _rewrite("time embeddings and their projections are computed once for all steps of a run")
    modulation_cache: bool = _rewrite("adaptive norms' scales and shifts are computed once for all steps of a run")
    sampler_step: bool = _rewrite("a pipeline's scheduler takes its step in one operator")
    split_skip: bool = _rewrite(
        "a stored map is read beside its partner and never concatenated with it", "group_norm_silu"
    )
    folded_bias: bool = _rewrite(
        "a convolution's bias and the time are added where the next GroupNorm reads them", "group_norm_silu"
    )
    folded_residual: bool = _rewrite(
        "a block's sum is made by its last product, or where the next GroupNorm reads it",
        *("unit_scale", "group_norm_silu"),
    )
    qkv: bool = _rewrite("queries, keys and values are one matrix product")
    prepacked: bool = _rewrite("convolutions and products on the CPU read weights that were laid out for them once")
    winograd: bool = _rewrite(
        "3x3 convolutions on the CPU are made by Winograd's filtering, with fewer multiplications",
        *("channels_last", "prepacked"),
    )
    arena: bool = _rewrite("on the CPU a call's temporaries lie where those of the call before lay")

    @classmethod
    def none(cls) -> Rewrites:
        return cls(**dict.fromkeys(names(), False))

    @classmethod
    def parse(cls, chosen: Rewrites | Iterable[str] | None) -> Rewrites:
        """Those named, all for None. Errors: InputError for an unknown name."""
        if chosen is None:
            return cls()
        if isinstance(chosen, Rewrites):
            return chosen
        wanted = (chosen,) if isinstance(chosen, str) else tuple(chosen)
        for name in wanted:
            if name not in names():
                raise InputError(f"rewrites: unknown rewrite {name!r}; expected some of {', '.join(names())}")
        return cls(**{name: name in wanted for name in names()})


def names() -> tuple[str, ...]:
    """All rewrites, in the order of `Rewrites`."""
    return tuple(each.name for each in fields(Rewrites))


def needed(name: str) -> tuple[str, ...]:
    """The rewrites without which that one changes nothing."""
    found: tuple[str, ...] = next(each.metadata["needs"] for each in fields(Rewrites) if each.name == name)
    return found
