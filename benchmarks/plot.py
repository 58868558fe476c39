"""A picture of a CSV: `python -m benchmarks.plot FILE.csv [--out FILE.png]`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.record import Row
from benchmarks.table import caption


def plot(rows: Sequence[Row], out: Path) -> None:
    """How much faster than its baseline each case runs on the backend that fastdiff chooses, one bar a case."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    chosen = [row for row in rows if row["chosen"] == "yes"]
    operators = list(dict.fromkeys(row["operator"] for row in chosen))
    colours = dict(zip(operators, pyplot.get_cmap("tab20").colors, strict=False))  # type: ignore[attr-defined]
    figure, axes = pyplot.subplots(figsize=(9, 0.24 * len(chosen) + 1.2), layout="constrained")
    places = range(len(chosen))
    bars = axes.barh(
        places,
        [float(row["speedup"]) for row in chosen],
        color=[colours[row["operator"]] for row in chosen],
    )
    axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=7)
    axes.set_yticks(places, [row["case"] for row in chosen], fontsize=7)
    axes.set_ylim(len(chosen) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_xlabel(
        "times as fast as the baseline (PyTorch; diffusers for sampler_step and drop_in), logarithmic; 1 = equal",
        fontsize=8,
    )
    axes.set_title(caption(rows), fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


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
