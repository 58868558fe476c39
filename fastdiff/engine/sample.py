"""Images from a loaded model: its schedule, prediction and labels put into `run`."""

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from fastdiff import samplers
from fastdiff.engine.run import StepInfo, run
from fastdiff.errors import InputError
from fastdiff.noise import integers, seed_tensor
from fastdiff.schedules import Schedule


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
    labels: Iterable[int] | None = None,
    method: str = "dpmpp_2m",
    steps: int = 20,
    guidance: float = 1.0,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    callback: Callable[[StepInfo], None] | None = None,
    progress: bool | None = None,
    **options: Any,
) -> Tensor:
    """Images of the model, float32 (N, *model.sample_shape) in [-1, 1], one for each seed.

    labels          one class per seed; None samples without a class
    method, steps   of `fastdiff.samplers.build`, which takes `options` too; `clip` is the model's own unless given
    guidance        uncond + guidance * (cond - uncond); 1.0 is the plain model and one evaluation a step
    batch_size      how many samples the network is given at once (twice as many with guidance); it does not change
                    which noise a sample gets
    device, dtype   those of the network, which is never moved or converted here; None takes what they are
    callback        called with a `StepInfo` after each evaluation of each batch
    progress        a progress bar: True, False, or None for long runs on a terminal

    Errors: InputError for labels that do not fit the seeds or the model, guidance without labels, and what `build` and
    `run` refuse.
    """
    options = {"clip": model.clip, **options}
    table = samplers.build(method, schedule=model.schedule, steps=steps, prediction=model.prediction, **options)
    keys = seed_tensor(seeds).tolist()
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size: expected a positive whole number, got {batch_size!r}")
    where, precision = _placement(model.network, device, dtype)
    classes = _classes(model, labels, len(keys), guidance)
    guided = guidance != 1.0
    parts = []
    for start in range(0, len(keys), batch_size):
        part = keys[start : start + batch_size]
        denoiser = _denoiser(model, classes, slice(start, start + len(part)), guided, where)
        parts.append(
            run(
                denoiser,
                table,
                shape=(len(part), *model.sample_shape),
                seeds=part,
                device=where,
                dtype=precision,
                guidance=guidance if guided else None,
                callback=callback,
                progress=progress,
            )
        )
    return torch.cat(parts).clamp_(-1.0, 1.0)


def _denoiser(
    model: Model, classes: list[int] | None, part: slice, guided: bool, device: torch.device
) -> Callable[[Tensor, Tensor], Tensor]:
    if classes is None:
        return lambda x, t: model.network(x, t)
    values = classes[part]
    if guided and model.null_label is not None:
        values = [model.null_label] * len(values) + values
    labels = torch.tensor(values, dtype=torch.int64, device=device)
    return lambda x, t: model.network(x, t, class_labels=labels)


def _classes(model: Model, labels: Iterable[int] | None, samples: int, guidance: float) -> list[int] | None:
    """The class of each sample; None for a network that has no classes."""
    if guidance != 1.0 and (labels is None or model.null_label is None):
        reason = "labels is None" if labels is None else "the model was trained without dropping labels"
        raise InputError(f"guidance: expected 1.0 because {reason}, got {guidance!r}")
    if model.num_classes is None:
        if labels is not None:
            raise InputError("labels: expected None because the model has no classes; leave them out")
        return None
    if labels is None:
        if model.null_label is None:
            raise InputError(f"labels: expected one class from 0 to {model.num_classes - 1} per seed, got None")
        return [model.null_label] * samples
    classes = integers("labels", labels)
    if len(classes) != samples:
        raise InputError(f"labels: expected {samples}, one per seed, got {len(classes)}")
    for index, label in enumerate(classes):
        if not 0 <= label < model.num_classes:
            raise InputError(f"labels[{index}]: expected a class from 0 to {model.num_classes - 1}, got {label}")
    return classes


def _placement(
    network: Any, device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype]:
    parameter = next(network.parameters())
    wanted = parameter.device if device is None else torch.device(device)
    if wanted.type != parameter.device.type or wanted.index not in (None, parameter.device.index):
        raise InputError(f"device: the network is on {parameter.device}, got {wanted}; move the network there first")
    if dtype not in (None, parameter.dtype):
        raise InputError(f"dtype: the network is {parameter.dtype}, got {dtype}; convert the network first")
    return parameter.device, parameter.dtype
