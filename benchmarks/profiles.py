"""Per-layer profiles of the large networks, before and after: `python -m benchmarks.profiles`, about 4 minutes.

Each network is diffusers' own, then ours without the CPU's rewrites of products (`prepacked`, `winograd`), then ours,
one after another. What was measured replaces its lines in benchmarks/results/profiles.csv, and profiles.png is drawn
from all that are there. What other programs disturb is measured again, and in the end left as it was: the exit status
is then 1. `--filter cifar/bfloat16,decoder` measures a part, `--draw` none.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import measure
from benchmarks.cases import DTYPES, NETWORKS
from benchmarks.record import RESULTS
from fastdiff import profiling
from fastdiff.cli.info import processor
from fastdiff.models.rewrites import Rewrites, names
from fastdiff.profiling import plot, table
from fastdiff.profiling.measure import Profile
from fastdiff.profiling.networks import Step
from fastdiff.profiling.table import Line

LATER = ("prepacked", "winograd")
STATES: dict[str, tuple[str, ...] | None] = {
    "diffusers": None,
    "fastdiff without prepacked and winograd": tuple(name for name in names() if name not in LATER),
    "fastdiff": names(),
}
"""By the name in the picture, the rewrites of our network; None for the library's."""
CASES = tuple((name, shape, dtype) for name, shape in NETWORKS[1:2] + NETWORKS[3:] for dtype in DTYPES)
STEPS, LAYERS, TRIES = 3, 10, 3


def measured(name: str, shape: Sequence[int], dtype: str) -> list[Line]:
    """The lines of one network in all states, but for those that other programs disturbed each time."""
    kind = getattr(torch, dtype)
    step = profiling.find(name, batch=shape[0], size=shape[2], dtype=kind)
    facts = {"model": name, "shape": "x".join(map(str, shape)), "dtype": dtype}
    facts |= {"threads": str(torch.get_num_threads()), "hardware": processor()}
    lines: list[Line] = []
    for code, rewrites in STATES.items():
        found = undisturbed(step, rewrites, kind)
        said = "not measured: the machine was too busy" if found is None else f"{found.seconds * 1e3:.4g} ms"
        print(f"{name} {dtype}, {code}: {said}", file=sys.stderr, flush=True)
        lines += [] if found is None else table.lines(found, {**facts, "code": code})
    return lines


def undisturbed(step: Step, rewrites: Sequence[str] | None, dtype: torch.dtype) -> Profile | None:
    """A profile during which other programs used next to nothing of the processors; None if there was none."""
    if rewrites is not None:
        step.network.rewrites = Rewrites.parse(rewrites)
    call = step.library() if rewrites is None else step.call()
    for _ in range(TRIES):
        start, used = time.perf_counter(), measure.others()
        found = profiling.profile(call, dtype=dtype, steps=STEPS)
        if measure.others() - used <= measure.DISTURBED * (time.perf_counter() - start) + measure.TICK:
            return found
    return None


def merged(old: Sequence[Line], new: Sequence[Line]) -> list[Line]:
    """The old lines without those of networks and states measured again, and the new ones; in the order of CASES and
    STATES, in which the picture has them."""

    def key(line: Line) -> tuple[str, ...]:
        return line["model"], line["shape"], line["dtype"], line["code"]

    codes = list(STATES)
    cases = [(name, "x".join(map(str, shape)), dtype) for name, shape, dtype in CASES]
    again = {key(line) for line in new}
    lines = [*(line for line in old if key(line) not in again), *new]
    return sorted(lines, key=lambda line: (cases.index(key(line)[:3]), codes.index(line["code"])))  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profiles", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--filter", default="", metavar="WORDS", help="only networks whose NAME/DTYPE has one of these")
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads (default: one per core)")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(parsed.threads or os.cpu_count() or 1)
    path = folder / "profiles.csv"
    lines: list[Line] = table.read(path) if path.is_file() else []
    words = parsed.filter.split(",")
    busy = False
    for name, shape, dtype in CASES:
        if parsed.draw or not any(word in f"{name}/{dtype}" for word in words):
            continue
        new = measured(name, shape, dtype)
        busy |= len({line["code"] for line in new}) < len(STATES)
        lines = merged(lines, new)
        table.write(path, lines)
    if lines:
        plot.draw(lines, path.with_suffix(".png"), layers=LAYERS)
    return int(busy)


if __name__ == "__main__":
    sys.exit(main())
