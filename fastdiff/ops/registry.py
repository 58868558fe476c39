"""The operators: schema, specification, and the shapes of their outputs. Grep a name to find its every place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff.ops import network_reference, prepass_reference, reference
from fastdiff.ops.reference import memory_format


class Backend(Protocol):
    """One implementation of one operator."""

    name: str

    def unavailable(self) -> str | None:
        """Why this backend cannot run at all in this process, or None."""

    def supports(self, *args: Any) -> str | None:
        """Why this backend cannot run this call, or None; args are those of the schema, in its order."""

    def cedes(self, *args: Any) -> bool:
        """Whether a backend further down the order is known to be faster at this call, which this one could run."""

    def run(self, *args: Any) -> Any:
        """The operator; called only where `supports` gave None."""


KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class KernelBackend:
    """What the backends with kernels of our own share: KERNEL_DTYPES is what they read, and write where the last
    argument is a dtype.

    tensors  how many of the first arguments are tensors whose dtype matters
    limits   as `supports`, for what the operator's kernel cannot take besides
    cedes    as in `Backend`; without it the backend cedes nothing
    """

    def __init__(
        self,
        operator: str,
        tensors: int,
        limits: Callable[..., str | None] | None = None,
        cedes: Callable[..., bool] | None = None,
    ) -> None:
        self.operator, self.tensors, self.limits, self._cedes = operator, tensors, limits, cedes

    def _absent(self, first: Tensor) -> str | None:
        """Why there is no kernel where the first tensor lies, or None."""
        raise NotImplementedError

    def supports(self, *args: Any) -> str | None:
        reason = self._absent(args[0])
        if reason is not None:
            return reason
        for value in args[: self.tensors]:
            if value.dtype not in KERNEL_DTYPES:
                return _other_dtypes("takes", value.dtype)
        written = args[-1]
        if isinstance(written, torch.dtype) and written not in KERNEL_DTYPES:
            return _other_dtypes("writes", written)
        return None if self.limits is None else self.limits(*args)

    def cedes(self, *args: Any) -> bool:
        return self._cedes is not None and self._cedes(*args)


def _other_dtypes(verb: str, dtype: torch.dtype) -> str:
    return f"it {verb} float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"


def noise_dtype(*args: Any) -> str | None:
    """As `supports`, for the noise, which is the third argument from the end."""
    noise = args[-3]
    return None if noise is None or noise.dtype in KERNEL_DTYPES else _other_dtypes("takes noise in", noise.dtype)


def sample_size(largest: int) -> Callable[..., str | None]:
    """As `supports`, for the number of elements of a sample of the first argument."""

    def limits(x: Tensor, *_: Any) -> str | None:
        count = x.numel() // len(x)
        return None if count <= largest else f"it counts a sample's elements up to {largest}, and there are {count}"

    return limits


@dataclass(frozen=True)
class Operator:
    """A registered operator: `fastdiff::name`."""

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]


def _fake_philox_normal(seeds: Tensor, shape: list[int], step: int, stream: int, dtype: torch.dtype) -> Tensor:
    return seeds.new_empty(shape, dtype=dtype)


def _fake_add_noise(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _fake_group_norm_silu(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    second = args[-2]
    channels = x.shape[1] + (0 if second is None else second.shape[1])
    shape, layout = (x.shape[0], channels, *x.shape[2:]), memory_format(x, second)
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
    return y, torch.empty_like(y) if args[-1] else x.new_empty(0)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    batch, heads, length, dim = q.shape
    return q.new_empty(batch, length, heads, dim).transpose(1, 2)


def _fake_sampler_step(x: Tensor, model_output: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    new_history, new_anchor, copies, model_input = args[-4:]
    shape = (x.shape[0] * copies if copies is not None else model_output.shape[0], *x.shape[1:])
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        x.new_empty(x.shape if new_history else (0,), dtype=torch.float32),
        x.new_empty(x.shape if new_anchor else (0,), dtype=torch.float32),
        x.new_empty((0,) if model_input is None else shape, dtype=model_input or x.dtype),
    )


def _fake_conv_bias_residual(x: Tensor, weight: Tensor, *args: Any) -> Tensor:
    shape = reference.convolved(x, weight, *args[-2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _fake_upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    shape = (x.shape[0], weight.shape[0] // 4, 2 * x.shape[2], 2 * x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _fake_guidance_weights(model_output: Tensor, weights: Tensor, *_: Any) -> Tensor:
    return weights.new_empty(weights.shape, dtype=torch.promote_types(model_output.dtype, torch.float32))


def _fake_scales(x: Tensor, model_output: Tensor, *_: Any) -> Tensor:
    wide = torch.promote_types(torch.promote_types(x.dtype, model_output.dtype), torch.float32)
    return x.new_empty((x.shape[0], 3), dtype=wide)


def _fake_geglu(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _fake_layer_norm_modulate(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if args[-1] else 0)


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator(
            "sampler_step",
            "(Tensor x, Tensor model_output, Tensor table, int row, Tensor? counter, Tensor? anchor, Tensor? hist1,"
            " Tensor? hist2, Tensor? hist3, Tensor? noise, Tensor? seeds, Tensor? weights, Tensor? scales,"
            " Tensor? known, Tensor? known_noise, Tensor? mask, bool new_history, bool new_anchor, int? copies,"
            " ScalarType? model_input) -> (Tensor, Tensor, Tensor, Tensor)",
            reference.sampler_step,
            _fake_sampler_step,
        ),
        Operator(
            "add_noise",
            "(Tensor x, Tensor alpha, Tensor sigma, Tensor? noise, Tensor? seeds, int step, int stream) -> Tensor",
            reference.add_noise,
            _fake_add_noise,
        ),
        Operator(
            "philox_normal",
            "(Tensor seeds, SymInt[] shape, int step, int stream, ScalarType dtype) -> Tensor",
            reference.philox_normal,
            _fake_philox_normal,
        ),
        Operator(
            "group_norm_silu",
            "(Tensor x, int groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? addend,"
            " Tensor? residual, Tensor? second, bool return_sum) -> (Tensor, Tensor)",
            reference.group_norm_silu,
            _fake_group_norm_silu,
        ),
        Operator(
            "attention",
            "(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor",
            reference.attention,
            _fake_attention,
        ),
        Operator(
            "guidance_weights",
            "(Tensor model_output, Tensor weights, float rescale, bool perpendicular, int? channels) -> Tensor",
            prepass_reference.guidance_weights,
            _fake_guidance_weights,
        ),
        Operator(
            "dynamic_threshold",
            "(Tensor x, Tensor model_output, Tensor table, int row, Tensor? counter, Tensor? weights,"
            " float percentile, float maximum) -> Tensor",
            prepass_reference.dynamic_threshold,
            _fake_scales,
        ),
        Operator(
            "langevin_step_size",
            "(Tensor x, Tensor model_output, Tensor table, int row, Tensor? counter, Tensor? weights,"
            " Tensor? noise, Tensor? seeds, float snr) -> Tensor",
            prepass_reference.langevin_step_size,
            _fake_scales,
        ),
        Operator("geglu", "(Tensor x) -> Tensor", network_reference.geglu, _fake_geglu),
        Operator(
            "layer_norm_modulate",
            "(Tensor x, Tensor? weight, Tensor? bias, Tensor? scale, Tensor? shift, float eps, Tensor? residual,"
            " Tensor? gate, bool return_sum) -> (Tensor, Tensor)",
            network_reference.layer_norm_modulate,
            _fake_layer_norm_modulate,
        ),
        Operator(
            "conv_bias_residual",
            "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int[2] stride, int[2] padding) -> Tensor",
            reference.conv_bias_residual,
            _fake_conv_bias_residual,
        ),
        Operator(
            "upsample_conv",
            "(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
            reference.upsample_conv,
            _fake_upsample_conv,
        ),
    )
}
