"""RePaint."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.schedulers.scheduling_repaint import RePaintSchedulerOutput
from torch import Tensor

from fastdiff import ops
from fastdiff.config import use_backend
from fastdiff.integrations.diffusers.by_timestep import ByTimestep
from fastdiff.integrations.diffusers.intervals import Made, Step
from fastdiff.integrations.diffusers.scheduler import draw


class RePaintScheduler(ByTimestep, diffusers.RePaintScheduler):
    """Rows of `ddim`, and the known part of the image noised with the same noise in the same operator."""

    _method = "ddim"
    betas: Tensor
    eta: float
    _forward: tuple[Tensor, dict[torch.device, Tensor]] | None = None

    def _step(self, key: int, options: Any) -> Step:
        before = key - self.config.num_train_timesteps // self.num_inference_steps
        return Step(key, self._level(key), self._level_or_clean(before), self._added(key, before))

    def _rows(self, steps: list[Step], options: float) -> Made | None:
        return self._made(steps, eta=options, clipped_epsilon=False)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        original_image: Tensor,
        mask: Tensor,
        generator: Any = None,
        return_dict: bool = True,
    ) -> RePaintSchedulerOutput | tuple[Tensor, ...]:
        """The state at the previous timestep, its known part from the image, and the data prediction."""
        found = None
        if model_output.shape == sample.shape and _usable(sample, original_image, mask):
            found = self._row(self._moment(timestep), self.eta)
        if found is None:
            options = (original_image, mask, generator, return_dict)
            return super().step(model_output, timestep, sample, *options)  # type: ignore[misc]
        noise = draw(model_output, generator)
        known = original_image if original_image.shape == sample.shape else original_image.expand(sample.shape)
        kept = {"known": known.contiguous(), "known_noise": noise, "mask": _made_anew(mask, sample)}
        x, data = self._take(found, sample, model_output, original_image, mask, noise=noise, **kept)
        return RePaintSchedulerOutput(prev_sample=x, pred_original_sample=data) if return_dict else (x, data)

    def undo_step(self, sample: Tensor, timestep: int | Tensor, generator: Any = None) -> Tensor:
        """sqrt(1 - beta) x + sqrt(beta) z for each training timestep of one step of the run."""
        count = self.config.num_train_timesteps // self.num_inference_steps
        time = self._moment(timestep)
        if time is None or time < 0 or sample.dtype == torch.float64 or sample.device.type == "mps":
            return super().undo_step(sample, timestep, generator)  # type: ignore[misc]
        scales = self._noising(sample.device)[:, time : time + count, None]
        if scales.shape[1] < count:
            raise IndexError(f"undo_step: timestep {time} and the {count} after it go beyond the training timesteps")
        scales = scales.expand(-1, -1, sample.shape[0]).contiguous()
        reference = torch.is_grad_enabled() and sample.requires_grad
        for index in range(count):
            arguments = (sample, scales[0, index], scales[1, index])
            noise = draw(sample, generator)
            if reference:
                with use_backend("reference"):
                    sample = ops.add_noise(*arguments, noise=noise)
            else:
                sample = ops.add_noise(*arguments, noise=noise)
        return sample

    def _noising(self, device: torch.device) -> Tensor:
        """sqrt(1 - beta) and sqrt(beta), (2, T) float32."""
        if self._forward is None or self._forward[0] is not self.betas:
            self._forward = (self.betas, {})
        made = self._forward[1]
        if device not in made:
            betas = self.betas.double()
            made[device] = torch.stack([(1.0 - betas).sqrt(), betas.sqrt()]).float().to(device)
        return made[device]


def _made_anew(mask: Tensor, sample: Tensor) -> Tensor:
    """1 - mask, as the operator wants it."""
    anew = torch.rsub(mask if mask.dtype is torch.float32 else mask.float(), 1.0)
    if mask.dim() == sample.dim() and mask.shape[2:] == sample.shape[2:] and anew.is_contiguous():
        return anew
    shape = (1,) * (sample.dim() - mask.dim()) + tuple(mask.shape)
    return anew.reshape(shape).expand(*shape[:2], *sample.shape[2:]).contiguous()


def _usable(sample: Tensor, image: Tensor, mask: Tensor) -> bool:
    """Whether the operator takes them; what has to be differentiated is left to diffusers."""
    device, shape = sample.device, sample.shape
    for tensor in (image, mask):
        if tensor.device != device or not tensor.is_floating_point() or tensor.requires_grad:
            return False
        given = tensor.shape
        if given == shape:
            continue
        wanted = shape[len(shape) - len(given) :]
        if len(given) > len(shape) or any(have not in (1, want) for have, want in zip(given, wanted, strict=True)):
            return False
    return True
