"""How products of bfloat16 are made on this machine's processor."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from fastdiff.ops import native

__all__ = ["Features", "Products", "extension", "products_of", "this"]


class Features(NamedTuple):
    """vectors: the instruction set of the extension's kernels, DEFAULT, AVX2 or AVX512.
    dots: one instruction multiplies and adds pairs of bfloat16 (AVX512-BF16).
    tiles: one instruction multiplies tiles of bfloat16 (AMX-BF16), and the system keeps their registers.
    """

    vectors: str
    dots: bool
    tiles: bool


class Products(NamedTuple):
    """widened: ours, as float32's are, of maps and weights that are stored in bfloat16.
    most: up to so many products they are ours, of pairs; more are oneDNN's.
    filtered: 3x3 convolutions are made by Winograd's filtering, of pairs.
    """

    widened: bool = False
    most: int = 0
    filtered: bool = False


def products_of(features: Features) -> Products:
    """What is fastest with these features.

    Without dot products PyTorch and oneDNN compute them slower than float32's. Of tiles only oneDNN makes use: 16 times
    as many products in a cycle as dot products make, so that ours gain only where oneDNN's 20 microseconds to begin
    would count.
    """
    if features.vectors == "DEFAULT":
        return Products()
    if features.vectors == "AVX512" and features.tiles:
        return Products(most=2**22 if features.dots else 0)
    if features.vectors == "AVX512" and features.dots:
        return Products(most=2**27, filtered=True)
    return Products(widened=True)


@cache
def this() -> Products:
    """What is fastest here; nothing of ours without the extension."""
    compiled = extension()
    if compiled is None:
        return Products()
    return products_of(
        Features(compiled.cpu_capability(), compiled.has_bfloat16_products(), compiled.has_bfloat16_tiles())
    )


def extension() -> Any:
    """The compiled extension, or None."""
    found = native.extension()
    return None if isinstance(found, str) else found
