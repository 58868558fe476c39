"""`fastdiff train`: the arguments and what they start."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from fastdiff.errors import InputError
from fastdiff.training.data import load_images
from fastdiff.training.losses import PREDICTIONS
from fastdiff.training.settings import DTYPES, Settings
from fastdiff.training.trainer import Trainer

DESCRIPTION = "Train a diffusion model on your own images and write it to one .safetensors file."
STORED = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EPILOG = """\
examples:
  fastdiff train --data photos/ --size 32 --out photos.safetensors --steps 20000
  fastdiff train --data photos/ --size 32 --out photos.safetensors --steps 20000 --resume

Beside the model stand NAME.state.safetensors (what --resume reads) and NAME.csv (the loss curve). The first Ctrl-C
writes the state and ends the run; the same command with --resume continues it bit for bit.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `fastdiff train` to a parser."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    _add_files(parser)
    _add_goal(parser)
    _add_training(parser)


def _add(group: argparse._ArgumentGroup, flag: str, kind: Callable[[str], object], text: str) -> None:
    """An option that is a field of `Settings`, with the field's default."""
    value = Settings.__dataclass_fields__[flag.removeprefix("--").replace("-", "_")].default
    shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
    note = "" if value is None else f" (default {shown})"
    group.add_argument(flag, type=kind, default=value, metavar="X", help=text + note)


def _add_files(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("files")
    files.add_argument(
        "--data", required=True, metavar="PATH", help="folder of images (sub-folders are classes), .npz, or IDX files"
    )
    files.add_argument("--out", required=True, metavar="FILE", help="the model to write, a .safetensors file")
    files.add_argument(
        "--store", choices=tuple(STORED), default="float32", help="how --out keeps the weights (default float32)"
    )
    files.add_argument("--resume", action="store_true", help="continue the run whose state stands beside --out")
    files.add_argument("--size", type=int, metavar="PIXELS", help="crop and resize every image to this size")
    files.add_argument("--split", default="train", help="which split of a folder of IDX files (default train)")
    files.add_argument("--class-names", metavar="A,B,...", help="names of the labels 0, 1, ...")


def _add_goal(parser: argparse.ArgumentParser) -> None:
    goal = parser.add_argument_group("what is learned")
    goal.add_argument("--prediction", choices=PREDICTIONS, default="v", help="what the network predicts (default v)")
    goal.add_argument(
        "--schedule",
        choices=("cosine", "linear"),
        default="cosine",
        help="noise schedule, unused by flow (default cosine)",
    )
    _add(goal, "--schedule-steps", int, "timesteps of the schedule")
    _add(goal, "--snr-cap", float, "weight noise levels by min(snr, X); not weighted if left out")
    _add(goal, "--label-dropout", float, "share of labels hidden, so that guidance works")
    goal.add_argument("--flip", action="store_true", help="mirror every other image, left to right")

    network = parser.add_argument_group("network")
    _add(network, "--channels", _integers, "channels of each level; each level halves the image")
    _add(network, "--layers", int, "residual blocks in each level")
    _add(network, "--attention", _integers, "image sizes at which levels have self-attention; 'none' for none")
    _add(network, "--head-dim", int, "channels of an attention head")
    _add(network, "--groups", int, "groups of every normalisation")


def _add_training(parser: argparse.ArgumentParser) -> None:
    optimizer = parser.add_argument_group("optimizer")
    optimizer.add_argument(
        "--steps", type=int, required=True, metavar="X", help="steps of the whole run; may change with --resume"
    )
    _add(optimizer, "--batch", int, "images in each step")
    _add(optimizer, "--parts", int, "compute each batch in X parts side by side; set --threads to 1 then")
    _add(optimizer, "--lr", float, "highest learning rate")
    _add(optimizer, "--warmup", int, "steps over which the learning rate rises; a cosine takes it to 0 afterwards")
    _add(optimizer, "--weight-decay", float, "weight decay of AdamW")
    _add(optimizer, "--beta2", float, "second beta of AdamW")
    _add(optimizer, "--clip", float, "largest norm of the gradient")
    _add(optimizer, "--ema", float, "decay of the averaged weights, which are the model that is written")

    run = parser.add_argument_group("run")
    _add(run, "--holdout", int, "images kept aside to measure the validation loss")
    _add(run, "--evaluate-every", int, "steps between validations; each also writes the model and the state")
    _add(run, "--patience", int, "end after X validations without improvement; 0 never does")
    _add(run, "--seed", int, "seed of every random choice")
    run.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="arithmetic (default bfloat16)")
    run.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    run.add_argument("--threads", type=int, metavar="X", help="processor threads (default: torch's choice)")
    run.add_argument("--stop-after", type=int, metavar="X", help="stop after step X; continue later with --resume")
    run.add_argument("--no-progress", action="store_true", help="no progress bar")


def _integers(text: str) -> tuple[int, ...]:
    return () if text == "none" else tuple(int(part) for part in text.split(","))


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The settings among parsed arguments."""
    return Settings(**{name: getattr(arguments, name) for name in Settings.__dataclass_fields__})


def main(arguments: argparse.Namespace) -> int:
    """Run `fastdiff train` with parsed arguments; the exit status is 0, or 130 where a signal ended it early.

    Errors: InputError for anything wrong with the arguments, the data or the files.
    """
    out = Path(arguments.out)
    if out.suffix != ".safetensors":
        raise InputError(f"out: expected a name ending in .safetensors, got {out}")
    settings = settings_from(arguments)
    if arguments.threads is not None:
        if arguments.threads < 1:
            raise InputError(f"threads: expected at least 1, got {arguments.threads}")
        torch.set_num_threads(arguments.threads)
    names = None if arguments.class_names is None else [n.strip() for n in arguments.class_names.split(",")]
    data = load_images(arguments.data, size=arguments.size, split=arguments.split, class_names=names)
    device, store = _device(arguments.device), STORED[arguments.store]
    trainer = Trainer(settings, data, out, resume=arguments.resume, device=device, store=store)
    with _stop_signals() as stopped:
        progress = trainer.run(
            stop_after=arguments.stop_after, should_stop=stopped, progress_bar=not arguments.no_progress
        )
        interrupted = stopped()
    best = "" if progress.best is None else f", best validation loss {progress.best:.5f}"
    more = "" if progress.finished else "; continue with --resume"
    print(f"{out}: step {progress.step} of {settings.steps}{best}{more}")
    return 130 if interrupted and not progress.finished else 0


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device: expected cpu or cuda, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError("device: expected cpu, as this machine has no CUDA GPU, got cuda")
    return device


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """The first SIGINT or SIGTERM is remembered, so that the step in hand ends; the second acts as usual."""
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def remember(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, remember)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
