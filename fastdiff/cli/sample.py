"""`fastdiff sample`: images from a model, into a file."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff import config, samplers
from fastdiff.cli import images, options, output
from fastdiff.engine.sample import STEPS
from fastdiff.errors import InputError
from fastdiff.models.loading import Model
from fastdiff.samplers import ADAPTIVE

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MOST_IMAGES = 1_000_000
STRENGTH = 0.6
EPILOG = """\
examples:
  fastdiff sample --out grid.png
  fastdiff sample --method ddim --steps 50 --label 3 --guidance 2 --seed 0 --count 16 --out grid.png
  fastdiff sample --label trouser bag --count 8 --out two-classes.png
  fastdiff sample --model my-model.safetensors --label none --count 1000 --out images.npz
  fastdiff sample --image boot.png --strength 0.8 --guidance 3 --label bag --out bags-like-that-boot.png
  fastdiff sample --image shirt.png --mask sleeves.png --label shirt --out other-sleeves.png
  fastdiff sample --method euler_ancestral --option eta=0.5 --json --out grid.png

Image number i has the seed SEED + i, and the same seed gives the same image whatever --count and --batch-size are.
'fastdiff methods' lists the methods and their options.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Draw images from a model and write them to a .png grid or an .npz file."
    parser.epilog = EPILOG
    what = parser.add_argument_group("what to draw")
    what.add_argument(
        "--model",
        default="fashion",
        metavar="NAME",
        help="'fashion' (inside the package), a .safetensors file of 'fastdiff train', or a diffusers folder",
    )
    what.add_argument(
        "--label",
        nargs="+",
        action="extend",
        metavar="CLASS",
        help="classes to draw, by number or name, taken in turn; 'none' for no class (default: every class in turn)",
    )
    what.add_argument("--count", type=int, default=16, metavar="N", help="number of images (default 16)")
    what.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the first image (default 0)")
    how = parser.add_argument_group("how to draw it")
    how.add_argument("--method", default="dpmpp_2m", help="sampling method (default dpmpp_2m)")
    how.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help="steps; more are slower, finer (default 20; adaptive methods choose their own)",
    )
    how.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        metavar="G",
        help="how strongly the class is followed: 1 as the model learned it, 2 to 4 clearer and less varied; anything"
        " but 1 doubles the work (default 1)",
    )
    how.add_argument(
        "--rescale",
        type=float,
        default=0.0,
        metavar="PHI",
        help="0 to 1: brings the contrast that --guidance raises back to the model's own (default 0)",
    )
    how.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method, such as eta=0.5"
    )
    start = parser.add_argument_group("what to start from")
    start.add_argument("--image", metavar="FILE", help="a picture to change, resized to the model's size")
    start.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="how much is made anew, 0 to 1 (default 0.6)",
    )
    start.add_argument("--mask", metavar="FILE", help="a picture, white where --image is made anew, black where kept")
    where = parser.add_argument_group("where it runs")
    where.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda where a GPU is (default auto)")
    where.add_argument("--dtype", choices=DTYPES, default="float32", help="arithmetic of the network (default float32)")
    where.add_argument(
        "--backend",
        metavar="NAME",
        help=f"run every operator on one of {', '.join(config.BACKENDS)}, or some of them: attention=triton,...",
    )
    where.add_argument("--threads", type=int, metavar="N", help="processor threads (default: torch's choice)")
    where.add_argument("--batch-size", type=int, default=64, metavar="N", help="images drawn at once (default 64)")
    result = parser.add_argument_group("result")
    result.add_argument("--out", default="samples.png", metavar="FILE", help=".png or .npz (default samples.png)")
    result.add_argument("--columns", type=int, metavar="N", help="images in a row (default: a full grid if one fits)")
    result.add_argument("--json", action="store_true", help="print the result as JSON, for programs")
    result.add_argument("--no-progress", action="store_true", help="no progress bar")


def main(arguments: argparse.Namespace) -> int:
    path = Path(arguments.out)
    _check_numbers(arguments)
    chosen = options.parse(arguments.option, arguments.method)
    _add_strength(chosen, arguments)
    if arguments.steps is None and not {"timesteps", "sigmas"} & chosen.keys() and arguments.method not in ADAPTIVE:
        arguments.steps = STEPS
    output.check_path(path)
    device = _device(arguments.device)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    model = fastdiff.load_model(arguments.model)
    output.check_shape(path, model.sample_shape)
    model.network.to(device=device, dtype=DTYPES[arguments.dtype])
    labels = _labels(arguments.label, arguments.count, model)
    image = images.read_image(arguments.image, model.sample_shape)
    mask = images.read_mask(arguments.mask, image)
    seeds = range(arguments.seed, arguments.seed + arguments.count)
    with nullcontext() if arguments.backend is None else fastdiff.use_backend(arguments.backend):
        started = time.perf_counter()
        drawn = fastdiff.sample(
            model,
            seeds=seeds,
            labels=labels,
            method=arguments.method,
            steps=arguments.steps,
            guidance=_guidance(arguments),
            image=image,
            mask=mask,
            batch_size=arguments.batch_size,
            progress=False if arguments.no_progress else None,
            **chosen,
        ).cpu()
        seconds = time.perf_counter() - started
    columns = arguments.columns or output.columns_for(arguments.count)
    output.write(path, drawn.numpy(), columns=columns, labels=labels, seeds=seeds)
    _print_result(arguments, path, device, labels, seconds, _steps_taken(arguments, model, chosen))
    return 0


def _guidance(arguments: argparse.Namespace) -> float | fastdiff.Guidance:
    if arguments.rescale == 0.0:
        return arguments.guidance
    return fastdiff.Guidance(scale=arguments.guidance, rescale=arguments.rescale)


def _add_strength(chosen: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.strength is not None:
        if arguments.image is None:
            raise InputError("strength: expected --image with it, the picture that is changed")
        chosen["strength"] = arguments.strength
    elif arguments.image is not None and arguments.mask is None and not _goes_to_noise(arguments.method):
        chosen.setdefault("strength", STRENGTH)


def _goes_to_noise(method: str) -> bool:
    """Whether the whole way from the image is what is asked for."""
    return method not in ADAPTIVE and samplers.find(method).inverse


def _print_result(
    arguments: argparse.Namespace,
    path: Path,
    device: torch.device,
    labels: Sequence[int] | None,
    seconds: float,
    steps: int | None,
) -> None:
    speed = None if steps is None else steps * math.ceil(arguments.count / arguments.batch_size) / seconds
    if arguments.json:
        names = ("model", "method", "steps", "guidance", "dtype", "backend", "seed")
        result = {
            "out": str(path),
            "images": arguments.count,
            "seconds": round(seconds, 4),
            "steps_per_second": None if speed is None else round(speed, 3),
            "batch_size": min(arguments.batch_size, arguments.count),
            "device": str(device),
            "labels": labels,
            "image": arguments.image,
            "mask": arguments.mask,
            **{name: getattr(arguments, name) for name in names},
        }
        print(json.dumps(result))
        return
    how = arguments.method if speed is None else f"{steps} steps of {arguments.method}, "
    rate = "" if speed is None else f"{speed:.2f} steps per second"
    print(f"{path}: {arguments.count} images in {seconds:.2f} s, {how}{rate} ({device}, {arguments.dtype})")


def _steps_taken(arguments: argparse.Namespace, model: Model, chosen: dict[str, Any]) -> int | None:
    """How many steps each image took, of which `strength` leaves some out; None where the method or the caller's
    points say how many there are."""
    if arguments.steps is None or arguments.method in ADAPTIVE:
        return None
    given: dict[str, Any] = {"schedule": model.schedule, "prediction": model.prediction, **chosen}
    return samplers.build(arguments.method, steps=arguments.steps, **given).steps


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name in ("count", "steps", "batch_size", "columns", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"{name.replace('_', '-')}: expected a positive whole number, got {value}")
    if arguments.count > MOST_IMAGES:
        raise InputError(f"count: expected at most {MOST_IMAGES}, got {arguments.count}; go on with another --seed")
    if not math.isfinite(arguments.guidance):
        raise InputError(f"guidance: expected a finite number, got {arguments.guidance}")
    if not -(2**63) <= arguments.seed <= 2**63 - arguments.count:
        raise InputError(f"seed: expected a whole number of at most 63 bits, got {arguments.seed}")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: expected cpu, cuda or auto, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device: expected cpu, cuda or auto, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device: expected cpu, since PyTorch finds no NVIDIA GPU here, got cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: expected a GPU from cuda:0 to cuda:{torch.cuda.device_count() - 1}, got {name}")
    return device


def _labels(asked: Sequence[str] | None, count: int, model: Model) -> list[int] | None:
    """The class of each image: those asked for in turn, every class in turn, or None."""
    if asked is not None and "none" in asked:
        if len(asked) > 1:
            raise InputError("label: expected 'none' alone, got other labels with it")
        return None
    if model.num_classes is None:
        if asked is not None:
            raise InputError(f"label: expected none, since the model has no classes, got {' '.join(asked)}")
        return None
    classes = range(model.num_classes) if asked is None else [_class(label, model) for label in asked]
    return [classes[i % len(classes)] for i in range(count)]


def _class(label: str, model: Model) -> int:
    assert model.num_classes is not None
    try:
        number = int(label)
    except ValueError:
        return _class_of_name(label, model.class_names)
    if not 0 <= number < model.num_classes:
        raise InputError(f"label: expected a class from 0 to {model.num_classes - 1}, got {number}")
    return number


def _class_of_name(label: str, class_names: Sequence[str]) -> int:
    names = [name.casefold() for name in class_names]
    if label.casefold() in names:
        return names.index(label.casefold())
    if not names:
        raise InputError(f"label: expected the number of a class, since the model has no names for them, got {label!r}")
    near = difflib.get_close_matches(label.casefold(), names, n=1)
    hint = f"; did you mean {class_names[names.index(near[0])]!r}?" if near else f"; expected {', '.join(class_names)}"
    raise InputError(f"label: no class is called {label!r}{hint}")
