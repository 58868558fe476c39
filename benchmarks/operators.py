"""How each operator's cases are called, by us and by others."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import network, schedulers
from benchmarks.cases import Case
from benchmarks.inputs import normal, size
from benchmarks.work import AUTOMATIC, Work
from fastdiff import ops
from fastdiff.noise import STREAM_STEP
from fastdiff.ops import prepass_reference, reference
from fastdiff.ops.row import CLIP, GUIDANCE, PREDICTION, ROW_SIZE

GROUPS = 32
CROSS_KEYS = 77


def sampler_step(case: Case, device: torch.device) -> Work:
    return schedulers.build(case, device)


def group_norm_silu(case: Case, device: torch.device) -> Work:
    """Of one input, or of two whose channels are as 2 to 1."""
    dtype, (name, *two) = getattr(torch, case.dtype), case.variant.split("_of_")
    layout = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[name]
    whole = normal(*case.shape, seed=0, dtype=dtype, device=device)
    channels = case.shape[1]
    second = channels // 3 if channels % 3 == 0 else channels // 2
    widths = [channels - second, second] if two else [channels]
    x, *more = (part.contiguous(memory_format=layout) for part in whole.split(widths, dim=1))
    second = more[0] if more else None
    weight, bias = (normal(case.shape[1], seed=seed, dtype=dtype, device=device) for seed in (1, 2))

    def pytorch() -> Tensor:
        joined = x if second is None else torch.cat([x, second], dim=1)
        return F.silu(F.group_norm(joined, GROUPS, weight, bias))

    truth, _ = reference.group_norm_silu(
        whole.double(), GROUPS, weight.double(), bias.double(), 1e-5, True, None, None, None, False
    )
    return Work(
        peers={"pytorch": pytorch},
        ours=lambda: ops.group_norm_silu(x, GROUPS, weight, bias, second=second),
        truth=truth,
        plain=pytorch(),
        traffic=2 * size(whole),
    )


def attention(case: Case, device: torch.device) -> Work:
    dtype = getattr(torch, case.dtype)
    batch, heads, queries, dim = case.shape
    keys = CROSS_KEYS if case.variant == "cross77" else queries
    # As networks have them: (B, L, H * D) out of a linear layer, seen as (B, H, L, D); joined again afterwards.
    q, k, v = (
        normal(batch, length, heads, dim, seed=seed, dtype=dtype, device=device).transpose(1, 2)
        for seed, length in enumerate((queries, keys, keys))
    )
    # Each query's own choice of keys, the same for all heads; about half of them.
    mask = None
    if case.variant == "masked":
        mask = normal(batch, 1, queries, keys, seed=3, dtype=torch.float32, device=device) > 0.0

    def joined(out: Tensor) -> Tensor:
        return out.transpose(1, 2).reshape(batch, queries, heads * dim)

    def pytorch() -> Tensor:
        return joined(F.scaled_dot_product_attention(q, k, v, mask))

    truth = reference.attention(q.double(), k.double(), v.double(), mask, 1.0 / math.sqrt(dim))
    return Work(
        peers={"pytorch": pytorch},
        ours=lambda: joined(ops.attention(q, k, v, mask=mask)),
        truth=joined(truth),
        plain=pytorch(),
        traffic=2 * size(q) + size(k, v) + (0 if mask is None else size(mask)),
        flops=4 * batch * heads * queries * keys * dim,
    )


def add_noise(case: Case, device: torch.device) -> Work:
    dtype = getattr(torch, case.dtype)
    count = case.shape[0]
    x = normal(*case.shape, seed=0, dtype=dtype, device=device)
    alpha = torch.linspace(0.1, 0.9, count, device=device)
    sigma = (1.0 - alpha**2).sqrt()
    seeds = torch.arange(count, device=device)
    drawn = case.variant == "seeds"
    noise = normal(*case.shape, seed=1, dtype=dtype, device=device)
    a, s = (value.to(dtype).view(-1, 1, 1, 1) for value in (alpha, sigma))

    def pytorch() -> Tensor:
        return a * x + s * (torch.randn_like(x) if drawn else noise)

    def ours() -> Tensor:
        return ops.add_noise(x, alpha, sigma, **({"seeds": seeds} if drawn else {"noise": noise}))

    given = reference.philox_normal(seeds, case.shape, 0, 0, torch.float32) if drawn else noise
    truth = alpha.double().view(-1, 1, 1, 1) * x.double() + sigma.double().view(-1, 1, 1, 1) * given.double()
    return Work(
        peers={"pytorch": pytorch},
        ours=ours,
        truth=truth,
        plain=a * x + s * given.to(dtype),
        comparable=not drawn,
        traffic=2 * size(x) + (0 if drawn else size(noise)),
    )


def philox_normal(case: Case, device: torch.device) -> Work:
    dtype = getattr(torch, case.dtype)
    seeds = torch.arange(case.shape[0], device=device)
    exact = reference.philox_normal(seeds, case.shape, 0, 0, torch.float64)
    return Work(
        peers={"pytorch": lambda: torch.randn(case.shape, dtype=dtype, device=device)},
        ours=lambda: ops.philox_normal(seeds, case.shape, dtype=dtype),
        truth=exact,
        plain=exact.to(dtype),
        comparable=False,
        traffic=size(exact.to(dtype)),
    )


def guidance_weights(case: Case, device: torch.device) -> Work:
    """Of a conditional output; "perpendicular": and of a negative one."""
    dtype = getattr(torch, case.dtype)
    samples, groups = case.shape[0], 3 if case.variant == "perpendicular" else 2
    m = normal(groups * samples, *case.shape[1:], seed=0, dtype=dtype, device=device)
    weights = torch.tensor([1.0, 7.5, -2.0], device=device)[:groups].repeat(samples, 1)
    options = {"rescale": 0.7, "perpendicular": groups == 3}

    def pytorch() -> Tensor:
        first, conditional, *others = m.chunk(groups)
        d = conditional - first
        lost = torch.zeros(samples, dtype=dtype, device=device)
        for k, other in enumerate(others, start=2):
            lost = lost + weights[0, k] * ((other - first) * d).sum(_inside(m)) / d.square().sum(_inside(m))
        kept = (weights[:, 1] - lost).to(dtype)
        guided = first + kept.view(-1, 1, 1, 1) * d
        for k, other in enumerate(others, start=2):
            guided = guided + weights[0, k] * (other - first)
        f = 0.7 * conditional.std(_inside(m)) / guided.std(_inside(m)) + 0.3
        return f[:, None] * torch.cat([weights[:, :1], kept[:, None], weights[:, 2:]], dim=1)

    return Work(
        peers={"pytorch": pytorch},
        ours=lambda: ops.guidance_weights(m, weights, **options),
        truth=prepass_reference.guidance_weights(m.double(), weights.double(), *options.values(), None),
        plain=prepass_reference.guidance_weights(m, weights, *options.values(), None),
        traffic=size(m),
    )


def conv_bias_residual(case: Case, device: torch.device) -> Work:
    """The last convolution of a ResNet block, 3x3, as many channels out as in, its weight in x's layout."""
    dtype = getattr(torch, case.dtype)
    layout = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[case.variant]
    batch, channels, height, width = case.shape
    x, residual = (
        normal(*case.shape, seed=seed, dtype=dtype, device=device).contiguous(memory_format=layout) for seed in (0, 3)
    )
    weight = normal(channels, channels, 3, 3, seed=1, dtype=torch.float32, device=device) / (3 * channels**0.5)
    weight, bias = weight.to(dtype, memory_format=layout), normal(channels, seed=2, dtype=dtype, device=device)

    def pytorch() -> Tensor:
        return residual + F.conv2d(x, weight, bias, padding=1)

    wide = (value.double() for value in (x, weight, bias, residual))
    return Work(
        peers={"pytorch": pytorch},
        ours=lambda: ops.conv_bias_residual(x, weight, bias, residual, padding=1),
        truth=reference.conv_bias_residual(*wide, [1, 1], [1, 1]),
        plain=pytorch(),
        traffic=3 * size(x) + size(weight),
        flops=2 * 9 * batch * height * width * channels**2,
    )


def upsample_conv(case: Case, device: torch.device) -> Work:
    """As many channels out as in, the convolution's weight in x's layout."""
    dtype = getattr(torch, case.dtype)
    layout = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[case.variant]
    batch, channels, height, width = case.shape
    x = normal(*case.shape, seed=0, dtype=dtype, device=device).contiguous(memory_format=layout)
    weight = normal(channels, channels, 3, 3, seed=1, dtype=torch.float32, device=device) / (3 * channels**0.5)
    weight, bias = weight.to(dtype, memory_format=layout), normal(channels, seed=2, dtype=dtype, device=device)
    folded = ops.fold_upsample(weight)

    def pytorch() -> Tensor:
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)

    up = F.interpolate(x.double(), scale_factor=2.0, mode="nearest")
    return Work(
        peers={"pytorch": pytorch},
        ours=lambda: ops.upsample_conv(x, folded, bias),
        truth=F.conv2d(up, weight.double(), bias.double(), padding=1),
        plain=pytorch(),
        traffic=5 * size(x) + size(folded),
        flops=2 * 16 * batch * height * width * channels**2,
    )


def _inside(samples: Tensor) -> tuple[int, ...]:
    """The dimensions of one sample."""
    return tuple(range(1, samples.dim()))


def _guided(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Callable[[], Tensor]]:
    """(x, model output of two groups, table, D an operation at a time)."""
    dtype = getattr(torch, case.dtype)
    x = normal(*case.shape, seed=0, dtype=dtype, device=device)
    m = normal(2 * case.shape[0], *case.shape[1:], seed=1, dtype=dtype, device=device)
    table = torch.zeros(1, ROW_SIZE, device=device)
    table[0, GUIDANCE], table[0, PREDICTION], table[0, CLIP] = 7.5, torch.tensor([1.1, -0.5]), 1.0

    def prediction() -> Tensor:
        unconditional, conditional = m.chunk(2)
        return 1.1 * x - 0.5 * (unconditional + 7.5 * (conditional - unconditional))

    return x, m, table, prediction


def dynamic_threshold(case: Case, device: torch.device) -> Work:
    x, m, table, prediction = _guided(case, device)

    def pytorch() -> Tensor:
        s = torch.quantile(prediction().float().abs().flatten(1), 0.995, dim=1).clamp(1.0, 100.0)
        return torch.stack([s, 1.0 / s, torch.ones_like(s)], dim=1)

    options = (table, 0, None, None, 0.995, 100.0)
    return Work(
        peers={"pytorch": pytorch},
        ours=lambda: ops.dynamic_threshold(x, m, table, 0, percentile=0.995, maximum=100.0),
        truth=prepass_reference.dynamic_threshold(x.double(), m.double(), *options),
        plain=prepass_reference.dynamic_threshold(x, m, *options),
        traffic=size(x, m),
    )


def langevin_step_size(case: Case, device: torch.device) -> Work:
    x, m, table, prediction = _guided(case, device)
    drawn = case.variant == "seeds"
    seeds = torch.arange(case.shape[0], device=device)
    noise = normal(*case.shape, seed=2, dtype=x.dtype, device=device)

    def pytorch() -> Tensor:
        z = torch.randn_like(x) if drawn else noise
        of_noise, of_score = (value.flatten(1).norm(dim=1) for value in (z, prediction()))
        e = 2.0 * (0.16 * of_noise / of_score) ** 2
        return torch.stack([torch.full_like(e, math.inf), e, (2.0 * e).sqrt()], dim=1)

    given = {"seeds": seeds} if drawn else {"noise": noise}
    exact = reference.philox_normal(seeds, case.shape, 0, STREAM_STEP, torch.float32) if drawn else noise
    options = (table, 0, None, None)
    return Work(
        peers={"pytorch": pytorch},
        ours=lambda: ops.langevin_step_size(x, m, table, 0, snr=0.16, **given),
        truth=prepass_reference.langevin_step_size(x.double(), m.double(), *options, exact.double(), None, 0.16),
        plain=prepass_reference.langevin_step_size(x, m, *options, exact, None, 0.16),
        comparable=not drawn,
        traffic=size(x, m) + (0 if drawn else size(noise)),
    )


def torch_normal(case: Case, device: torch.device) -> Work:
    dtype = getattr(torch, case.dtype)
    theirs, ours = (torch.Generator(device).manual_seed(0) for _ in range(2))

    def pytorch() -> Tensor:
        return torch.randn(case.shape, generator=theirs.manual_seed(1), device=device, dtype=dtype)

    truth = pytorch()
    return Work(
        peers={"pytorch": pytorch},
        ours=lambda: ops.torch_normal(case.shape, generator=ours.manual_seed(1), device=device, dtype=dtype),
        truth=truth.double(),
        plain=truth,
        traffic=size(truth),
        backends=(AUTOMATIC,),
    )


BUILDERS: dict[str, Callable[[Case, torch.device], Work]] = {
    "sampler_step": sampler_step,
    "group_norm_silu": group_norm_silu,
    "attention": attention,
    "add_noise": add_noise,
    "philox_normal": philox_normal,
    "guidance_weights": guidance_weights,
    "dynamic_threshold": dynamic_threshold,
    "langevin_step_size": langevin_step_size,
    "geglu": network.geglu,
    "layer_norm_modulate": network.layer_norm_modulate,
    "conv_bias_residual": conv_bias_residual,
    "upsample_conv": upsample_conv,
    "torch_normal": torch_normal,
}
