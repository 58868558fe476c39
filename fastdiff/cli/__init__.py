"""The command line: `fastdiff sample | train | info | methods | plan | profile | bench`, one module for each."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from fastdiff import __version__
from fastdiff.errors import BackendError, InputError

COMMANDS = {
    "sample": "draw images from a model and write them to a .png grid or an .npz file",
    "train": "train a model on your own images",
    "info": "show versions, processor, GPUs, and which code each operator runs on here",
    "methods": "list the sampling methods and their options",
    "plan": "print the coefficients of a method, row by row",
    "profile": "show where the time of a network's step goes, layer by layer",
    "bench": "measure the operators and the sampling loop against PyTorch and diffusers",
}
EPILOG = """\
examples:
  fastdiff sample --out grid.png
  fastdiff sample --method ddim --steps 50 --label 3 --guidance 2 --seed 0 --count 16 --out grid.png
  fastdiff info

'fastdiff COMMAND --help' explains one command.
"""
FAILURE, INTERRUPTED = 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose error is one line and that knows no abbreviations."""

    def __init__(self, **options: object) -> None:
        super().__init__(**{"allow_abbrev": False, **options})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(FAILURE, f"fastdiff: error: {message}; see '{self.prog} --help'\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit status: 0, 2 for bad input, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning  # type: ignore[assignment]
        try:
            return _run(arguments)
        except SystemExit as exit_:
            return int(exit_.code or 0)
        except (InputError, BackendError) as error:
            print(f"fastdiff: error: {' '.join(str(error).split())}", file=sys.stderr)
            return FAILURE
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            # The reader of our output (head, less) has left; what Python would still flush goes nowhere.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0


def _run(arguments: list[str]) -> int:
    parser = Parser(
        prog="fastdiff",
        description="Fast, exact sampling from diffusion models.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fastdiff {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    # Only the command that is asked for is imported, and with it the libraries that it alone needs.
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    module = import_module(f"fastdiff.cli.{asked}") if asked in COMMANDS else None
    for name, summary in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if module is not None and name == asked:
            command.formatter_class = argparse.RawDescriptionHelpFormatter
            module.add_arguments(command)
    parsed = parser.parse_args(arguments)
    assert module is not None  # the parser accepts no other command
    return int(module.main(parsed))


def _show_warning(message: Warning | str, *_: object) -> None:
    print(f"fastdiff: warning: {str(message).removeprefix('fastdiff: ')}", file=sys.stderr)
