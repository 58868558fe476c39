"""Per-layer profiles of the large networks, before a change and after it: `python -m benchmarks.profiles STATE`.

STATE is `diffusers` (the library's own network), `before` or `after` (ours, in the checkout that this runs in). Lines
of that state in benchmarks/results/profiles.csv are replaced, and profiles.png is drawn from all that are there.
`--filter cifar/bfloat16,decoder` measures a part, `--draw` none.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cases import DTYPES, FRESH, NETWORKS
from benchmarks.record import RESULTS
from fastdiff import profiling
from fastdiff.cli.info import processor
from fastdiff.profiling import plot, table
from fastdiff.profiling.table import Line

STATES = {"diffusers": "diffusers", "before": "fastdiff before", "after": "fastdiff"}
CASES = tuple((name, shape, dtype) for name, shape in (*FRESH, *NETWORKS[3:]) for dtype in DTYPES)
STEPS, LAYERS = 3, 12


def measured(name: str, shape: Sequence[int], dtype: str, state: str) -> list[Line]:
    """The lines of one network."""
    kind = getattr(torch, dtype)
    step = profiling.find(name, batch=shape[0], size=shape[2], dtype=kind)
    call = step.library() if state == "diffusers" else step.call()
    found = profiling.profile(call, dtype=kind, steps=STEPS)
    facts = {"model": name, "shape": "x".join(map(str, shape)), "dtype": dtype, "code": STATES[state]}
    return table.lines(found, {**facts, "threads": str(torch.get_num_threads()), "hardware": processor()})


def merged(old: Sequence[Line], new: Sequence[Line]) -> list[Line]:
    """The old lines without those of networks and states measured again, and the new ones; in the order of CASES and
    STATES, in which the picture has them."""

    def key(line: Line) -> tuple[str, ...]:
        return line["model"], line["shape"], line["dtype"], line["code"]

    codes = list(STATES.values())
    cases = [(name, "x".join(map(str, shape)), dtype) for name, shape, dtype in CASES]
    again = {key(line) for line in new}
    lines = [*(line for line in old if key(line) not in again), *new]
    return sorted(lines, key=lambda line: (cases.index(key(line)[:3]), codes.index(line["code"])))  # type: ignore[arg-type]


def main(arguments: Sequence[str] | None = None, folder: Path = RESULTS) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profiles", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("state", choices=STATES)
    parser.add_argument("--filter", default="", metavar="WORDS", help="only networks whose NAME/DTYPE has one of these")
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads (default: one per core)")
    parser.add_argument("--draw", action="store_true", help="measure nothing")
    parsed = parser.parse_args(arguments)
    torch.set_num_threads(parsed.threads or os.cpu_count() or 1)
    path = folder / "profiles.csv"
    lines: list[Line] = table.read(path) if path.is_file() else []
    words = parsed.filter.split(",")
    for name, shape, dtype in CASES:
        if parsed.draw or not any(word in f"{name}/{dtype}" for word in words):
            continue
        lines = merged(lines, measured(name, shape, dtype, parsed.state))
        table.write(path, lines)
        print(f"{name} {dtype} {parsed.state}", file=sys.stderr, flush=True)
    plot.draw(lines, path.with_suffix(".png"), layers=LAYERS)


if __name__ == "__main__":
    main()
