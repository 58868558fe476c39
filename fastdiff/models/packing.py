"""Layers that read the same input as one: their weights lie side by side, and one matrix product serves all of them."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from fastdiff.models.arena import outside
from fastdiff.models.leaf import is_plain
from fastdiff.models.packs import Packs
from fastdiff.models.prepacked import apply, products, takes

__all__ = ["pack", "product", "unpack"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_packing = threading.Lock()


def product(leaves: tuple[nn.Module, ...], x: Tensor, packs: Packs | None = None) -> tuple[Tensor, ...]:
    """(W_1 x + b_1, W_2 x + b_2, ...) with [W_1; W_2; ...] x as one product, where the layers allow it.

    x: (..., in). Each result (..., out) is then a view of one tensor. At the first call the weights are laid side by
    side in memory: the Parameters stay the objects that they are, so that whoever writes into one or loads a state dict
    changes what is multiplied, and what moves them apart (`.to()`) has them laid so again. Layers that are not plain,
    weights that need a gradient, and graphs that are being compiled take a product each.

    With `packs` the product reads a copy of the weights that was laid out for it.
    """
    if packs is not None and takes(leaves, x, packs) and len({leaf.bias is None for leaf in leaves}) == 1:
        return products(leaves, x, packs).split([len(leaf.weight) for leaf in leaves], dim=-1)  # type: ignore[arg-type]
    together = _together(leaves)
    if together is None:
        return tuple(apply(leaf, x, packs) for leaf in leaves)
    weight, bias = together
    sizes = [leaf.weight.shape[0] for leaf in leaves]  # type: ignore[index]
    return torch.nn.functional.linear(x, weight, bias).split(sizes, dim=-1)


def pack(leaves: Sequence[nn.Module]) -> None:
    """Lays the layers' parameters side by side before a first call does, where they can be."""
    with torch.no_grad():
        _together(leaves)


def unpack(leaves: Sequence[nn.Module]) -> None:
    """Gives the parameters that `product` laid side by side memory of their own again."""
    with _packing:
        for parts in zip(*map(_parameters, leaves), strict=False):
            if None not in parts and _adjacent(parts):
                for part in parts:
                    part.data = part.detach().clone()


def _parameters(leaf: nn.Module) -> tuple[Tensor | None, ...]:
    return (leaf.weight, leaf.bias) if is_plain(leaf) else ()  # type: ignore[return-value]


def _together(leaves: Sequence[nn.Module]) -> tuple[Tensor, Tensor | None] | None:
    """The weights and the biases of all layers as one tensor each; None where they cannot be."""
    if torch.compiler.is_compiling() or not all(map(is_plain, leaves)):
        return None
    weights = [leaf.weight for leaf in leaves]
    biases = [leaf.bias for leaf in leaves]
    biased = biases[0] is not None
    if any((bias is not None) != biased for bias in biases):
        return None
    # Both are there for as long as the parameters are: they do not own the memory.
    weight = _side_by_side(weights)  # type: ignore[arg-type]
    bias = _side_by_side(biases) if biased and weight is not None else None  # type: ignore[arg-type]
    return None if weight is None or (biased and bias is None) else (weight, bias)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor | None:
    """The parts, one after the other, as one tensor on their own memory, which is made so if it is not."""
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        return None
    first = parts[0]
    shape = (sum(map(len, parts)), *first.shape[1:])
    if first.is_meta or isinstance(first, FakeTensor):
        return first.new_empty(shape)  # without data there is nothing to lay anywhere
    if not _adjacent(parts):
        # Moved by one thread only: another could be reading the memory that is given up.
        with _packing:
            if not _adjacent(parts) and not _pack(parts):
                return None
    size = math.prod(shape) * first.element_size()
    memory = torch._C._construct_storage_from_data_pointer(first.data_ptr(), first.device, size)
    return torch.empty(0, dtype=first.dtype, device=first.device).set_(memory, 0, shape, first.stride())


def _adjacent(parts: Sequence[Tensor]) -> bool:
    """Whether the parts follow each other in memory, whatever storages say: those of an allocation are their own."""
    first = parts[0]
    address, kind, trailing = first.data_ptr(), first.dtype, first.shape[1:]
    for part in parts:
        if part.data_ptr() != address or part.dtype != kind or part.shape[1:] != trailing or not part.is_contiguous():
            return False
        address += part.nbytes
    return True


def _pack(parts: Sequence[Tensor]) -> bool:
    first = parts[0]
    for part in parts:
        alike = part.dtype == first.dtype and part.device == first.device and part.shape[1:] == first.shape[1:]
        # A quantized weight is a tensor of another class; memory that processes share has to stay where it is.
        ordinary = type(part) in (Tensor, nn.Parameter) and not (part.is_cpu and part.is_shared())
        if not alike or not ordinary or part.dtype not in _DTYPES or part.is_inference():
            return False
    if len({id(part) for part in parts}) < len(parts):
        return False
    # A tensor made in inference mode would make the parameters such tensors for good.
    with torch.inference_mode(False), torch.no_grad(), outside():
        packed = torch.cat([part.detach() for part in parts])
        for part, place in zip(parts, packed.split([len(part) for part in parts]), strict=True):
            # Through DLPack each gets a storage that is exactly its own part: code that saves models takes tensors of
            # one storage for one tensor, and keeps one name of them.
            part.data = torch.from_dlpack(place)
    return True
