"""`fastdiff methods`: the table of sampling methods."""

from __future__ import annotations

import argparse
import json
from typing import Any

from fastdiff import samplers

EPILOG = """\
ORDER         how fast the error falls: with twice the steps an order-2 method is 4 times closer
CALLS         how often the network is called in each step
NOISE         whether a step adds noise of its own
OPTIONS       pass them to 'fastdiff sample' as --option NAME=VALUE

examples:
  fastdiff methods
  fastdiff methods --json
  fastdiff sample --method ddim --option eta=0.5 --out grid.png
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "List the sampling methods and their options."
    parser.epilog = EPILOG
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def main(arguments: argparse.Namespace) -> int:
    methods = samplers.methods().values()
    if arguments.json:
        print(json.dumps({"methods": [_described(info) for info in methods], "grid_options": samplers.GRID_OPTIONS}))
        return 0
    heads = ("METHOD", "ORDER", "CALLS", "NOISE", "OPTIONS")
    rows = [heads] + [
        (
            info.name,
            str(info.order),
            str(info.evaluations_per_step),
            "yes" if info.stochastic else "no",
            " ".join(f"{name}={_plain(value)}" for name, value in info.options.items()) or "-",
        )
        for info in methods
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(f"\nEvery method also takes: {', '.join(samplers.GRID_OPTIONS)}\n\nPapers:")
    for info in methods:
        print(f"  {info.name.ljust(widths[0])}  {info.paper}")
    return 0


def _described(info: samplers.MethodInfo) -> dict[str, Any]:
    return {
        "name": info.name,
        "paper": info.paper,
        "order": info.order,
        "stochastic": info.stochastic,
        "evaluations_per_step": info.evaluations_per_step,
        "history": info.history,
        "options": dict(info.options),
    }


def _plain(value: Any) -> str:
    return "automatic" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
