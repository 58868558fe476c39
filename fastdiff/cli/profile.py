"""`fastdiff profile`: where the time of a network's step goes, layer by layer."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fastdiff import profiling
from fastdiff.cli.info import processor
from fastdiff.cli.output import check_file
from fastdiff.errors import InputError
from fastdiff.profiling import plot, table

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPILOG = """\
SHARE      of a step's time. A step is one call of the network, after two that are not counted; each figure is the
           median of --steps calls
GFLOP/s    operations of the layer as it is defined, two for each multiplication, in its time. Winograd, and a doubled
           map's convolution on the small map, do fewer, and so may reach more than the machine's peak
GB/s       bytes of every tensor that is read or written, once
ROOFLINE   the shortest time that the machine's measured rates allow, by the time taken: those of the fastest matrix
           product, and of a copy of as many bytes (from cache where they fit); BOUND says which of them

'between operators' is Python and what calls of operators do not show. Measured on the CPU.

examples:
  fastdiff profile fashion
  fastdiff profile cifar --batch 4 --dtype bfloat16
  fastdiff profile my-model.safetensors --size 64 --threads 2 --rows 50
  fastdiff profile sd15 --diffusers --plot sd15.png --csv sd15.csv
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show where the time of a network's step goes: operator, share, achieved rate, roofline."
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "model",
        nargs="?",
        default="fashion",
        metavar="MODEL",
        help="'fashion', a .safetensors file of 'fastdiff train', a diffusers folder (of an autoencoder: its decoder),"
        f" or one with random weights: {', '.join(profiling.NETWORKS)} (default fashion)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="arithmetic (default float32)")
    parser.add_argument("--batch", type=int, metavar="N", help="samples in a call (default: the network's, or 1)")
    parser.add_argument("--size", type=int, metavar="N", help="height and width of the input (default: the network's)")
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads (default: torch's choice)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps that are measured (default 5)")
    parser.add_argument("--rows", type=int, default=20, metavar="N", help="longest layers to print (default 20)")
    parser.add_argument(
        "--diffusers", action="store_true", help="the same for diffusers' own network, with its weights"
    )
    parser.add_argument("--csv", metavar="FILE", help="write every layer into a table")
    parser.add_argument("--plot", metavar="FILE", help="draw the layers' times and rooflines (.png, .svg or .pdf)")


def main(arguments: argparse.Namespace) -> int:
    for name in ("threads", "steps", "rows"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise InputError(f"{name}: expected a positive whole number, got {value}")
    for name in ("csv", "plot"):
        if getattr(arguments, name) is not None:
            check_file(name, Path(getattr(arguments, name)))
    if arguments.plot is not None:
        plot.check(Path(arguments.plot))
    before = torch.get_num_threads()
    torch.set_num_threads(arguments.threads or before)
    try:
        return _run(arguments)
    finally:
        torch.set_num_threads(before)


def _run(arguments: argparse.Namespace) -> int:
    dtype = DTYPES[arguments.dtype]
    step = profiling.find(arguments.model, batch=arguments.batch, size=arguments.size, dtype=dtype)
    # The library's first, so that its absence ends the command before anything is measured.
    calls = {"diffusers": step.library()} if arguments.diffusers else {}
    calls["fastdiff"] = step.call()
    facts = {
        "model": arguments.model,
        "shape": "x".join(map(str, step.x.shape)),
        "dtype": arguments.dtype,
        "threads": str(torch.get_num_threads()),
        "hardware": processor(),
    }
    print("{model}, {shape}, {dtype}, {threads} threads of {hardware}".format(**facts))
    rows: list[table.Line] = []
    for code, call in calls.items():
        found = profiling.profile(call, dtype=dtype, steps=arguments.steps)
        print(f"\n{table.page(code, found, longest=arguments.rows)}", flush=True)
        rows += table.lines(found, {**facts, "code": code})
    if arguments.csv is not None:
        table.write(Path(arguments.csv), rows)
    if arguments.plot is not None:
        plot.draw(rows, Path(arguments.plot))
    return 0
