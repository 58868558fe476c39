"""How the cases of networks' activations and norms are called, by us and by others."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.inputs import normal, size
from benchmarks.work import Work
from fastdiff import ops
from fastdiff.ops import network_reference


def geglu(case: Case, device: torch.device) -> Work:
    x = normal(*case.shape, seed=0, dtype=getattr(torch, case.dtype), device=device)

    def pytorch() -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return a * F.gelu(b)

    plain = pytorch()
    return Work(
        peers={"pytorch": pytorch},
        ours=lambda: ops.geglu(x),
        truth=network_reference.geglu(x.double()),
        plain=plain,
        traffic=size(x, plain),
    )


def layer_norm_modulate(case: Case, device: torch.device) -> Work:
    """ "residual": of a sum that goes on beside the norm, with weight and bias. "modulated": with a sample's own gate,
    scale and shift instead, which are parts of one tensor.
    """
    dtype = getattr(torch, case.dtype)
    x, residual = (normal(*case.shape, seed=seed, dtype=dtype, device=device) for seed in (0, 1))
    samples, channels = case.shape[0], case.shape[-1]
    weight, bias = (normal(channels, seed=seed, dtype=dtype, device=device) for seed in (2, 3))
    gate, scale, shift = normal(samples, 3 * channels, seed=4, dtype=dtype, device=device).chunk(3, dim=1)
    modulated = case.variant == "modulated"
    given = {"scale": scale, "shift": shift, "gate": gate} if modulated else {"weight": weight, "bias": bias}

    def pytorch() -> Tensor:
        if modulated:
            h = x + gate[:, None] * residual
            return F.layer_norm(h, (channels,)) * (1 + scale[:, None]) + shift[:, None]
        h = x + residual
        return F.layer_norm(h, (channels,), weight, bias)

    def ours() -> Tensor:
        y, _ = ops.layer_norm_modulate(x, residual=residual, return_sum=True, **given)
        return y

    wide = {name: value.double() for name, value in given.items()}
    truth, _ = network_reference.layer_norm_modulate(
        x.double(),
        *(wide.get(name) for name in ("weight", "bias", "scale", "shift")),
        1e-5,
        residual.double(),
        wide.get("gate"),
        False,
    )
    return Work(
        peers={"pytorch": pytorch}, ours=ours, truth=truth, plain=pytorch(), traffic=4 * size(x) + size(*given.values())
    )
