"""Images from a loaded model: its schedule, prediction and labels put into `run`."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff import samplers
from fastdiff.engine.adaptive import run_adaptive
from fastdiff.engine.guidance import Guidance
from fastdiff.engine.run import Denoiser, StepInfo, device_of, run
from fastdiff.errors import InputError
from fastdiff.noise import integers, seed_tensor
from fastdiff.schedules import Schedule

STEPS = 20


class Model(Protocol):
    """What `sample` needs of a model; `fastdiff.load_model` gives it."""

    @property
    def network(self) -> Any: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def prediction(self) -> str: ...
    @property
    def sample_shape(self) -> tuple[int, ...]: ...
    @property
    def num_classes(self) -> int | None: ...
    @property
    def null_label(self) -> int | None: ...
    @property
    def clip(self) -> float | None: ...


def sample(
    model: Model,
    *,
    seeds: Iterable[int],
    labels: Iterable[int] | Sequence[Iterable[int]] | None = None,
    method: str = "dpmpp_2m",
    steps: int | None = None,
    guidance: float | Guidance = 1.0,
    image: Tensor | None = None,
    mask: Tensor | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    callback: Callable[[StepInfo], None] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Tensor:
    """Images of the model, float32 (N, *model.sample_shape) in [-1, 1], one for each seed; noise of an inverse method.

    labels          one class per seed; None samples without a class. With a `Guidance` of several scales one such list
                    for each.
    method, steps   of `fastdiff.samplers.build`, which takes `options` too; `clip` is the model's own unless given, and
                    steps are 20 unless the options name the points. Or a method of `fastdiff.run_adaptive` with its
                    options, which chooses its own steps.
    guidance        uncond + guidance * (cond - uncond); 1.0 is the plain model and one evaluation a step. A `Guidance`
                    says more.
    image           what to start from, in [-1, 1]: (N, C, H, W), or one for all. With `strength=0.6` the last 60 % of
                    the steps are taken from the image noised to their level; a larger image than the model's own is
                    made larger, for networks that can.
    mask            inpainting: 1 where a new image is made, 0 where `image` is kept; broadcasts to the image
    batch_size      how many samples the network is given at once (twice as many with guidance); it does not change
                    which noise a sample gets
    device, dtype   those of the network, which is never moved or converted here; None takes what they are
    callback        called with a `StepInfo` after each evaluation of each batch
    progress        a progress bar: True, False, or None for long runs on a terminal

    Errors: InputError for labels that do not fit the seeds or the model, guidance without labels, and what `build` and
    `run` refuse.
    """
    options = {"clip": model.clip, **options}
    keys = seed_tensor(seeds).tolist()
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size: expected a positive whole number, got {batch_size!r}")
    where, precision = _placement(model.network, device, dtype)
    guide = _guidance(guidance)
    conditions = _conditions(model, labels, len(keys), guide)
    given = {
        "image": _repeated("image", image, len(keys), where),
        "mask": _repeated("mask", mask, len(keys), where),
    }
    shape = model.sample_shape if given["image"] is None else tuple(given["image"].shape[1:])
    bounded = True
    if method in samplers.ADAPTIVE:
        _check_adaptive(method, steps, guide, given, callback)
        draw = _adaptive(model, method, guide, options)
    else:
        table = _table(model, method, steps, options)
        bounded = not table.inverse
        draw = partial(run, table=table, guidance=guide, callback=callback, progress=progress)
    parts = []
    for begin in range(0, len(keys), batch_size):
        part = slice(begin, begin + batch_size)
        start = {name: value[part] for name, value in given.items() if value is not None}
        denoiser = _denoiser(model, conditions, part, where)
        size = (len(keys[part]), *shape)
        parts.append(draw(denoiser, shape=size, seeds=keys[part], device=where, dtype=precision, **start))
    # What an inverse method gives is noise, which has no bounds.
    return torch.cat(parts).clamp_(-1.0, 1.0) if bounded else torch.cat(parts)


def _table(model: Model, method: str, steps: int | None, options: dict[str, Any]) -> samplers.StepTable:
    if steps is None and options.get("timesteps") is None and options.get("sigmas") is None:
        steps = STEPS
    return samplers.build(method, schedule=model.schedule, steps=steps, prediction=model.prediction, **options)


def _adaptive(model: Model, method: str, guidance: Guidance | None, options: dict[str, Any]) -> Callable[..., Tensor]:
    problem: dict[str, Any] = {"schedule": model.schedule, "prediction": model.prediction, **options}
    scale = None if guidance is None else guidance.scales[0]

    def draw(denoiser: Denoiser, **batch: Any) -> Tensor:
        return run_adaptive(denoiser, method=method, guidance=scale, **problem, **batch).x

    return draw


def _check_adaptive(
    method: str, steps: int | None, guidance: Guidance | None, given: dict[str, Tensor | None], callback: object
) -> None:
    """What a method that chooses its own steps cannot take."""
    if steps is not None:
        raise InputError(f"steps: expected None with {method}, which chooses its own; set rtol and atol instead")
    for name, value in given.items():
        if value is not None:
            raise InputError(f"{name}: expected None with {method}, which starts from noise; use one with fixed steps")
    if callback is not None:
        raise InputError(f"callback: expected None with {method}; fastdiff.run_adaptive takes one of its own kind")
    if guidance is not None and guidance != Guidance(scale=guidance.scale):
        raise InputError(f"guidance: expected one number with {method}, got {guidance}")


def _guidance(guidance: float | Guidance) -> Guidance | None:
    """None where the plain conditional model is asked for."""
    if isinstance(guidance, Guidance):
        return guidance
    return None if guidance == 1.0 and not isinstance(guidance, bool) else Guidance(scale=guidance)


def _repeated(name: str, value: Tensor | None, samples: int, device: torch.device) -> Tensor | None:
    """(N, ...) of what has one entry for each sample or one for all."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dim() < 2:
        raise InputError(f"{name}: expected a tensor (N, C, H, W) or (C, H, W), got {type(value).__name__}")
    full = value if value.dim() == 4 else value.reshape((1,) * (4 - value.dim()) + tuple(value.shape))
    if full.shape[0] not in (1, samples):
        raise InputError(f"{name}: expected {samples}, one per seed, or one for all, got {full.shape[0]}")
    return full.to(device).expand(samples, *full.shape[1:])


@torch.inference_mode(False)  # what a network makes of the labels it may remember for tensors that count versions
def _denoiser(
    model: Model, conditions: list[list[int]] | None, part: slice, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    """The network with the labels of each group: [uncond; cond_1; ...], or the first condition alone."""
    if conditions is None:
        return lambda x, t: model.network(x, t)
    values = [condition[part] for condition in conditions]
    plain = torch.tensor(values[0], dtype=torch.int64, device=device)
    samples = len(values[0])
    if model.null_label is None:
        return lambda x, t: model.network(x, t, class_labels=plain)
    groups = [[model.null_label] * samples, *values]
    every = torch.tensor([label for group in groups for label in group], dtype=torch.int64, device=device)
    return lambda x, t: model.network(x, t, class_labels=plain if len(x) == samples else every)


def _conditions(
    model: Model,
    labels: Iterable[int] | Sequence[Iterable[int]] | None,
    samples: int,
    guidance: Guidance | None,
) -> list[list[int]] | None:
    """The classes of each sample, a list for each condition; None for a network that has no classes."""
    scales = () if guidance is None else guidance.scales
    if scales and (labels is None or model.null_label is None):
        reason = "labels is None" if labels is None else "the model was trained without dropping labels"
        raise InputError(f"guidance: expected 1.0 because {reason}, got {scales[0] if len(scales) == 1 else scales}")
    if model.num_classes is None:
        if labels is not None:
            raise InputError("labels: expected None because the model has no classes; leave them out")
        return None
    if labels is None:
        if model.null_label is None:
            raise InputError(f"labels: expected one class from 0 to {model.num_classes - 1} per seed, got None")
        return [[model.null_label] * samples]
    if len(scales) < 2:
        return [_classes("labels", labels, samples, model.num_classes)]
    several = list(labels)
    if len(several) != len(scales):
        raise InputError(f"labels: expected {len(scales)} lists, one for each scale of guidance, got {len(several)}")
    return [
        _classes(f"labels[{index}]", condition, samples, model.num_classes) for index, condition in enumerate(several)
    ]


def _classes(name: str, labels: Any, samples: int, number: int) -> list[int]:
    classes = integers(name, labels)
    if len(classes) != samples:
        raise InputError(f"{name}: expected {samples}, one per seed, got {len(classes)}")
    for index, label in enumerate(classes):
        if not 0 <= label < number:
            raise InputError(f"{name}[{index}]: expected a class from 0 to {number - 1}, got {label}")
    return classes


def _placement(
    network: Any, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    parameter = next(network.parameters())
    wanted = parameter.device if device is None else device_of(device)
    if wanted.type != parameter.device.type or wanted.index not in (None, parameter.device.index):
        raise InputError(f"device: the network is on {parameter.device}, got {wanted}; move the network there first")
    if dtype not in (None, parameter.dtype):
        raise InputError(f"dtype: the network is {parameter.dtype}, got {dtype}; convert the network first")
    return parameter.device, parameter.dtype
