"""Error against network calls of every deterministic method: `python -m benchmarks.convergence [--out FOLDER]`.

The data is the Gaussian mixture of tests/mixture.py, for which the probability-flow ODE is solved exactly; each table
is run in float64 by tests/interpret.py from sigma / alpha = 50 to 0.05 (flow: 20 to 0.05), and the error is the root
mean square distance from the exact quantiles. Writes convergence.csv and convergence.png.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.record import RESULTS, ROOT
from fastdiff import samplers, schedules
from fastdiff.files import write_atomic

STEPS = (5, 10, 20, 40, 80, 160, 320, 640)
COLUMNS = ("method", "options", "order", "schedule", "steps", "calls", "error", "slope")
VP, FLOW = schedules.vp_sde(1000), schedules.flow(1000, shift=2.0)
RATIOS = {"vp": (50.0, 0.05), "flow": (20.0, 0.05)}


class Curve(NamedTuple):
    """A method with options, and the order that it has with them."""

    method: str
    options: Mapping[str, Any]
    order: int

    @property
    def label(self) -> str:
        return " ".join([self.method, *(f"{name}={value}" for name, value in self.options.items())])


VARIANTS = (
    Curve("unipc", {"order": 3, "lower_order_final": False}, 4),
    Curve("deis", {"order": 3, "lower_order_final": False}, 3),
    Curve("dpm_solver", {"order": 3, "lower_order_final": False}, 3),
    Curve("dpm_solver_singlestep", {"order": 3}, 3),
    Curve("dpmpp_singlestep", {"order": 3}, 3),
)
"""Higher orders of methods whose default is 2."""


def curves() -> list[Curve]:
    """Every deterministic method of the registry with its default options, and the variants."""
    known = samplers.methods()
    plain = [Curve(info.name, {}, info.order) for info in known.values() if not info.stochastic]
    return plain + [curve for curve in VARIANTS if curve.method in known]


def levels(kind: str, steps: int) -> list[float]:
    """steps + 1 levels, sigma / alpha or a flow's t, even in their logarithm but for the first three steps.

    Multistep methods start with orders 1 and 2: steps of length h^2 and h^(4/3) keep the errors of those below h^4.
    """
    high, low = map(math.log, RATIOS[kind])
    h = (high - low) / steps
    lengths = np.concatenate([[0.5 * h**2, 0.5 * h ** (4 / 3), 0.5 * h], np.full(steps - 3, h)])
    ratios = np.exp(high - (high - low) * np.cumsum([0.0, *lengths]) / lengths.sum())
    return (ratios / (1.0 + ratios) if kind == "flow" else ratios).tolist()


def error(curve: Curve, steps: int) -> tuple[int, float]:
    """(calls of the network, root mean square distance from the exact quantiles)."""
    schedule = _schedule(curve)
    table = samplers.build(
        curve.method,
        schedule=schedule,
        prediction="flow" if schedule is FLOW else "v",
        sigmas=levels(schedule.kind, steps),
        final_sigma="last",
        **curve.options,
    )
    return len(table), _distance()(table, schedule)


def rows(curve: Curve) -> list[dict[str, str]]:
    """A line of the CSV for each number of steps; slope is -d log(error) / d log(calls) from the line before."""
    found = [error(curve, steps) for steps in STEPS]
    slopes = [""] + [
        f"{math.log(before[1] / after[1]) / math.log(after[0] / before[0]):.3f}" for before, after in pairwise(found)
    ]
    facts = {
        "method": curve.method,
        "options": json.dumps(dict(curve.options)),
        "order": str(curve.order),
        "schedule": _schedule(curve).name,
    }
    return [
        facts | {"steps": str(steps), "calls": str(calls), "error": f"{value:.6e}", "slope": slope}
        for steps, (calls, value), slope in zip(STEPS, found, slopes, strict=True)
    ]


def write(path: Path, lines: Sequence[Mapping[str, str]]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    write_atomic(path, buffer.getvalue().encode())


PANELS: dict[str, Callable[[int, bool], bool]] = {
    "order 1": lambda order, several: order == 1,
    "order 2, several calls a step": lambda order, several: order == 2 and several,
    "order 2, one call a step": lambda order, several: order == 2 and not several,
    "order 3 and higher": lambda order, several: order > 2,
}
MARKERS = "os^vDP*Xph<>"


def plot(lines: Sequence[Mapping[str, str]], out: Path) -> None:
    """One panel for each kind of order, all with the same axes; the other panels' curves in grey behind."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    found: dict[tuple[str, str], list[Mapping[str, str]]] = {}
    for line in lines:
        found.setdefault((line["method"], line["options"]), []).append(line)
    drawn: list[list[list[Mapping[str, str]]]] = []
    for curve in found.values():
        same = next((group for group in drawn if _coincide(group[0], curve)), None)
        drawn.append([curve]) if same is None else same.append(curve)
    small = {"fontsize": 8, "title_fontsize": 8, "frameon": False}
    figure, grid = pyplot.subplots(2, 2, figsize=(12, 9), sharex=True, sharey=True, layout="constrained")
    for axes, (title, holds) in zip(grid.flat, PANELS.items(), strict=True):
        inside = [group for group in drawn if holds(int(group[0][0]["order"]), _calls_a_step(group[0]) > 1)]
        for group in drawn:
            axes.loglog(*_points(group[0]), color="0.88", linewidth=0.8, zorder=0)
        for index, group in enumerate(inside):
            axes.loglog(
                *_points(group[0]),
                label=_legend(group),
                marker=MARKERS[index % len(MARKERS)],
                markersize=4,
                linewidth=1.2,
                color=pyplot.get_cmap("tab10")(index % 10),
            )
        axes.set_title(title, loc="left", fontsize=11)
        axes.grid(which="major", color="0.93", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if inside:
            axes.legend(title="method, slope at the end", loc="lower left", alignment="left", **small)
    for axes in grid[1]:
        axes.set_xlabel("calls of the network")
    for axes in grid[:, 0]:
        axes.set_ylabel("root mean square error")
    figure.suptitle(
        "Distance from the exact samples of a Gaussian mixture, every deterministic method, float64", fontsize=12
    )
    figure.savefig(out, dpi=130)
    pyplot.close(figure)


def _points(curve: Sequence[Mapping[str, str]]) -> tuple[list[float], list[float]]:
    return [float(line["calls"]) for line in curve], [float(line["error"]) for line in curve]


def _calls_a_step(curve: Sequence[Mapping[str, str]]) -> int:
    return round(int(curve[-1]["calls"]) / int(curve[-1]["steps"]))


def _coincide(one: Sequence[Mapping[str, str]], other: Sequence[Mapping[str, str]]) -> bool:
    """Whether they would be drawn over each other: methods that are the same but for their options."""
    same = one[0]["order"] == other[0]["order"] and one[0]["schedule"] == other[0]["schedule"]
    return same and np.allclose(_points(one), _points(other), rtol=0.01, atol=0.0)


def _legend(group: Sequence[Sequence[Mapping[str, str]]]) -> str:
    labels = [Curve(curve[0]["method"], json.loads(curve[0]["options"]), 0).label for curve in group]
    names = " = ".join(label.replace(" lower_order_final=False", "") for label in labels)
    flow = " (flow)" if group[0][0]["schedule"] == "flow" else ""
    return f"{names}{flow}: {float(group[0][-1]['slope']):.2f}"


def _schedule(curve: Curve) -> schedules.Schedule:
    kinds = samplers.find(curve.method).kinds
    return VP if not kinds or "vp" in kinds else FLOW


def _distance() -> Callable[..., float]:
    """That of tests/convergence.py, so that tests and figure have one measure."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.append(folder)
    from convergence import distance

    return distance


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence", description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for convergence.csv and convergence.png")
    parser.add_argument("--plot", action="store_true", help="only draw the picture of the CSV that is there")
    arguments = parser.parse_args()
    path = arguments.out / "convergence.csv"
    if not arguments.plot:
        write(path, [line for curve in curves() for line in rows(curve)])
    with path.open(newline="", encoding="utf-8") as file:
        plot(list(csv.DictReader(file)), path.with_suffix(".png"))
    print(path, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
