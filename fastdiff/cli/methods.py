"""`fastdiff methods`: the table of sampling methods, for a terminal, for programs, and for documents."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastdiff import samplers
from fastdiff.cli.options import plain

WIDTH = 120
EPILOG = """\
ORDER         how fast the error falls: with twice the steps an order-2 method is 4 times closer
CALLS         how often the network is called in each step
NOISE         whether a step adds noise of its own
HISTORY       how many earlier predictions of the network a step reads
OPTIONS       pass them to 'fastdiff sample' or 'fastdiff plan' as --option NAME=VALUE; automatic, which is the value
              null, leaves it to the method (s_tmax: no bound)

examples:
  fastdiff methods
  fastdiff methods --json
  fastdiff methods --markdown > fastdiff/samplers/README.md
  fastdiff sample --method ddim --option eta=0.5 --out grid.png
"""
INTRODUCTION = """\
# Methods

Made from the registry by `fastdiff methods --markdown > fastdiff/samplers/README.md`; do not edit it.

Each method is a function in a file of this folder that gives the rows of a table. Order: with twice the steps the error
of a method of order p falls to 1/2^p; of a method with noise, the order that it has without. Calls: of the network, a
step. History: how many earlier predictions a step reads. Options: with their defaults; automatic is what the method
chooses itself (None, on the command line null). Schedules: the kinds that the method is defined on.

![Error against calls of the network](../../benchmarks/results/convergence.png)

The picture is made by `python -m benchmarks.convergence`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "List the sampling methods and their options."
    parser.epilog = EPILOG
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON, for programs")
    form.add_argument("--markdown", action="store_true", help="print the page fastdiff/samplers/README.md")


def main(arguments: argparse.Namespace) -> int:
    if arguments.json:
        print(json.dumps(described()))
    else:
        print(markdown() if arguments.markdown else page())
    return 0


def described() -> dict[str, Any]:
    """The registry as plain data."""
    names = ("name", "paper", "order", "stochastic", "evaluations_per_step", "history", "options", "kinds")
    adaptive = ("name", "paper", "order", "options", "needs")
    return {
        "methods": [_fields(info, names) for info in samplers.methods().values()],
        "adaptive": [_fields(info, adaptive) for info in samplers.ADAPTIVE.values()],
        "grid_options": samplers.GRID_OPTIONS,
    }


def page() -> str:
    """The registry as a page of text."""
    methods, adaptive = samplers.methods().values(), samplers.ADAPTIVE.values()
    rows = [
        (
            info.name,
            str(info.order),
            str(info.evaluations_per_step),
            "yes" if info.stochastic else "no",
            str(info.history),
            _options(info.options),
        )
        for info in methods
    ]
    own = [(info.name, str(info.order), _options(info.options)) for info in adaptive]
    lines = [
        *_table(("METHOD", "ORDER", "CALLS", "NOISE", "HISTORY", "OPTIONS"), rows),
        "",
        *textwrap.wrap(f"Every method also takes: {', '.join(samplers.GRID_OPTIONS)}", WIDTH),
        "",
        "Methods that choose their own steps:",
        "",
        *_table(("METHOD", "ORDER", "OPTIONS"), own),
        "",
        "Papers:",
    ]
    papers: dict[str, list[str]] = {}
    for paper, name in [
        *((info.paper, info.name) for info in methods),
        *((info.paper, info.name) for info in adaptive),
    ]:
        papers.setdefault(paper, []).append(name)
    for paper, names in papers.items():
        lines += [f"  {paper}", f"      {', '.join(names)}"]
    return "\n".join(lines)


def markdown() -> str:
    """The page fastdiff/samplers/README.md, without its last newline."""
    fixed = [
        (
            f"`{info.name}`",
            str(info.order),
            str(info.evaluations_per_step),
            "yes" if info.stochastic else "no",
            str(info.history),
            _code(info.options),
            ", ".join(info.kinds) or "every",
            info.paper,
        )
        for info in samplers.methods().values()
    ]
    own = [(f"`{info.name}`", str(info.order), _code(info.options), info.paper) for info in samplers.ADAPTIVE.values()]
    grid = ", ".join(f"`{name}`" for name in samplers.GRID_OPTIONS)
    heads = ("method", "order", "calls", "noise", "history", "options", "schedules", "source")
    return "\n".join(
        [
            INTRODUCTION,
            "",
            *_markdown_table(heads, "lrrlrlll", fixed),
            "",
            *textwrap.wrap(f"Every method also takes the options of its grid, {grid}.", WIDTH),
            "",
            "Methods that choose their own steps have no table; `fastdiff.run_adaptive` runs them.",
            "",
            *_markdown_table(("method", "order", "options", "source"), "lrll", own),
        ]
    )


def _fields(info: object, names: Iterable[str]) -> dict[str, Any]:
    values = {name: getattr(info, name) for name in names}
    return {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}


def _options(options: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={plain(value)}" for name, value in options.items()) or "-"


def _code(options: Mapping[str, Any]) -> str:
    return ", ".join(f"`{name}={plain(value)}`" for name, value in options.items())


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Left-aligned columns, the last one wrapped."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)][:-1]
    indent = " " * sum(width + 2 for width in widths)
    lines = []
    for *cells, last in (heads, *rows):
        start = "".join(cell.ljust(width + 2) for cell, width in zip(cells, widths, strict=True))
        lines += textwrap.wrap(
            last,
            WIDTH,
            initial_indent=start,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    return lines


def _markdown_table(heads: Sequence[str], alignment: str, rows: Iterable[Sequence[str]]) -> list[str]:
    rules = ["--:" if side == "r" else "---" for side in alignment]
    return [f"| {' | '.join(heads)} |", f"|{'|'.join(rules)}|", *(f"| {' | '.join(row)} |" for row in rows)]
