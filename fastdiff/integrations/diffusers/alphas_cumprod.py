"""What training and image-to-image ask of a scheduler: `alphas_cumprod` by timestep, noise added, velocities."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fastdiff import ops
from fastdiff.config import use_backend

__all__ = ["AlphasCumprod", "Noising", "Velocity", "joint_dtype", "numbers"]


class AlphasCumprod:
    """An ordinary tensor to its users; what it holds is also known to the host, from when it is set."""

    _alphas_cumprod: Tensor
    _alphas2: npt.NDArray[Any]
    _scales: dict[torch.device, Tensor]

    @property
    def alphas_cumprod(self) -> Tensor:
        return self._alphas_cumprod

    @alphas_cumprod.setter
    def alphas_cumprod(self, value: Tensor) -> None:
        if value is self.__dict__.get("_alphas_cumprod"):
            return
        self._alphas_cumprod = value
        self._scales = {}
        self._alphas2 = np.zeros(0) if value.is_meta else numbers(value)


class Noising(AlphasCumprod):
    """First base of a class whose `add_noise` looks timesteps up: one fused operator, and `alphas_cumprod` stays where
    it is, so that no step has to read it back from a device."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x + sigma noise, each sample at its own timestep."""
        mixed = self._mixed(original_samples, noise, timesteps, 1)
        return self._unmoved("add_noise", original_samples, noise, timesteps) if mixed is None else mixed

    def _mixed(self, x: Tensor, noise: Tensor, timesteps: Tensor, second: int) -> Tensor | None:
        """alpha x + scale noise with the scale of that row of `_scale`; None where theirs has to do it."""
        dtype = joint_dtype(x, noise)
        shape = x.shape
        count = timesteps.numel()
        if noise.shape != shape or not shape or count not in (1, shape[0]) or x.numel() == 0:
            return None
        if dtype == torch.float64 or not dtype.is_floating_point or x.device != noise.device:
            return None
        index = timesteps.to(x.device).flatten()
        if index.dtype not in (torch.int64, torch.int32):
            return None
        scales = self._scale(x.device)[:, index]
        if count != shape[0]:
            scales = scales.expand(-1, shape[0]).contiguous()
        x = x.to(dtype)
        if torch.is_grad_enabled() and (x.requires_grad or noise.requires_grad):
            with use_backend("reference"):
                return ops.add_noise(x, scales[0], scales[second], noise=noise)
        return ops.add_noise(x, scales[0], scales[second], noise=noise)

    def _scale(self, device: torch.device) -> Tensor:
        """alpha, sigma and -sigma of every timestep, (3, T) float32."""
        scales = self._scales.get(device)
        if scales is None:
            levels = self._alphas2.astype(np.float64)
            sigmas = np.sqrt(1.0 - levels)
            made = np.stack([np.sqrt(levels), sigmas, -sigmas]).astype(np.float32)
            scales = self._scales[device] = torch.from_numpy(made).to(device)
        return scales

    def _unmoved(self, name: str, *arguments: Tensor) -> Tensor:
        """Their method, without the move of `alphas_cumprod` to the samples' device that it brings about."""
        kept = self._alphas_cumprod
        try:
            result: Tensor = getattr(super(), name)(*arguments)
        finally:
            self.alphas_cumprod = kept
        return result


class Velocity(Noising):
    """The same for a class that gives velocities as well."""

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha noise - sigma x, each sample at its own timestep."""
        mixed = self._mixed(noise, sample, timesteps, 2)
        return self._unmoved("get_velocity", sample, noise, timesteps) if mixed is None else mixed


def joint_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of a sum of these tensors."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.dtype != dtype:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def numbers(tensor: Tensor) -> npt.NDArray[Any]:
    """The values of a tensor on the host, float32 or float64."""
    tensor = tensor.detach().cpu()
    return (tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()).numpy()
