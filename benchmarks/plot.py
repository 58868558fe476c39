"""A picture of a CSV: `python -m benchmarks.plot FILE.csv [--out FILE.png]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.record import Row
from benchmarks.table import caption

SPACE = 4
"""Bars' heights that a panel's title and axis take."""


@dataclass(frozen=True)
class Panel:
    title: str
    operators: tuple[str, ...] = ()
    logarithmic: bool = False


COLUMNS = (
    (Panel("operators, against PyTorch; sampler_step against diffusers' schedulers", logarithmic=True),),
    (
        Panel("schedulers' steps, against diffusers' own", ("drop_in",), logarithmic=True),
        Panel("networks and whole loops, against diffusers and PyTorch", ("network", "sampling")),
        Panel("networks, against torch.compile", ("compiled",)),
        Panel("networks with all rewrites, against all but this one", ("rewrite",)),
    ),
)
"""From left to right, and in each from top to bottom; the first panel has what is in no other."""


def plot(rows: Sequence[Row], out: Path) -> None:
    """How much faster than its baseline each case runs on the backend that fastdiff chooses, one bar a case."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    # First calls are no speed of a network.
    chosen = [row for row in rows if row["chosen"] == "yes" and row["operator"] != "first_call"]
    columns = [found for column in COLUMNS if (found := [(p, r) for p in column if (r := _shown(p, chosen))])]
    heights = [sum(len(shown) + SPACE for _, shown in column) for column in columns]
    size = (9 * len(columns), 0.2 * max(heights) + 0.4)
    figure = pyplot.figure(figsize=size, layout="constrained")
    outer = figure.add_gridspec(1, len(columns))
    for place, (column, height) in enumerate(zip(columns, heights, strict=True)):
        # What is left under a shorter column stays empty, so that all bars are equally high.
        parts = [len(shown) + SPACE for _, shown in column] + [max(heights) - height + 1e-6]
        inner = outer[place].subgridspec(len(parts), 1, height_ratios=parts)
        for index, (panel, shown) in enumerate(column):
            _draw(figure.add_subplot(inner[index]), panel, shown)
    figure.suptitle("times as fast as the baseline; " + caption(rows), fontsize=9)
    figure.savefig(out, dpi=110)
    pyplot.close(figure)


def _shown(panel: Panel, rows: Sequence[Row]) -> list[Row]:
    named = {operator for column in COLUMNS for each in column for operator in each.operators}
    return [
        row for row in rows if row["operator"] in panel.operators or not (panel.operators or row["operator"] in named)
    ]


def _draw(axes: Any, panel: Panel, rows: Sequence[Row]) -> None:
    """Bars that begin at 1: to the right what is faster, to the left what is slower."""
    from matplotlib import colormaps

    operators = list(dict.fromkeys(row["operator"] for row in rows))
    colours = dict(zip(operators, cycle(colormaps["tab20"].colors)))  # type: ignore[attr-defined]
    speeds = [float(row["speedup"]) for row in rows]
    axes.set_xscale("log" if panel.logarithmic else "linear")
    axes.barh(range(len(rows)), [s - 1.0 for s in speeds], left=1.0, color=[colours[row["operator"]] for row in rows])
    for place, speed in enumerate(speeds):
        axes.annotate(
            f"{speed:.1f}" if panel.logarithmic else f"{speed:.2f}",
            (max(speed, 1.0), place),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
        )
    axes.set_yticks(range(len(rows)), [row["case"] for row in rows], fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.margins(x=0.08)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(panel.title, fontsize=8, loc="left")
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, help="default: beside the CSV")
    arguments = parser.parse_args()
    out = arguments.out or arguments.csv.with_suffix(".png")
    plot(record.read(arguments.csv), out)
    print(out)


if __name__ == "__main__":
    main()
