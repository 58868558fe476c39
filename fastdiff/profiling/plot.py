"""Profiles as a picture: the time of each layer, by each code that was measured."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastdiff.errors import InputError
from fastdiff.files import write_atomic
from fastdiff.profiling.table import Line

__all__ = ["check", "draw"]

FORMATS = ("png", "svg", "pdf")
OTHERS = "all others"


def check(path: Path) -> None:
    """InputError unless that file can be drawn."""
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise InputError(f"plot: expected a name ending in .{', .'.join(FORMATS)}, got {path}")
    if find_spec("matplotlib") is None:
        raise InputError("plot: expected matplotlib, which is not installed: pip install matplotlib")


def draw(rows: Sequence[Line], path: Path, *, layers: int = 24) -> None:
    """A panel for each model, shape and dtype, in it so many of the longest layers, and one bar for all others. The
    black line of a bar is the layer's roofline. Codes are told apart by colour, in the order of the rows."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, ...], list[Line]] = {}
    for row in rows:
        panels.setdefault((row["model"], row["shape"], row["dtype"]), []).append(row)
    wide = 2 if len(panels) > 1 else 1
    deep = -(-len(panels) // wide)
    figure, axes = pyplot.subplots(
        deep, wide, figsize=(9 * wide, 0.34 * (layers + 5) * deep), layout="constrained", squeeze=False
    )
    for place, (title, measured) in zip(axes.flat, panels.items(), strict=False):
        _panel(place, ", ".join(title), measured, layers)
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    figure.suptitle(f"time of a step's layers; {rows[0]['hardware']}, {rows[0]['threads']} threads", fontsize=9)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lower().removeprefix("."), dpi=110)
    pyplot.close(figure)
    write_atomic(path, picture.getvalue())


def _panel(axes: Any, title: str, rows: Sequence[Line], layers: int) -> None:
    codes = list(dict.fromkeys(row["code"] for row in rows))
    times = {(row["code"], _name(row)): row for row in rows}
    names = list(dict.fromkeys(_name(row) for row in rows))
    names.sort(key=lambda name: -max(_number(times.get((code, name)), "time_us") for code in codes))
    shown, others = names[:layers], names[layers:]
    height = 0.84 / len(codes)
    for index, code in enumerate(codes):
        step = next(row["step_us"] for row in rows if row["code"] == code)
        lengths = [_number(times.get((code, name)), "time_us") for name in shown]
        lengths.append(sum(_number(times.get((code, name)), "time_us") for name in others))
        places = [place + (index - (len(codes) - 1) / 2) * height for place in range(len(lengths))]
        axes.barh(places, [length / 1e3 for length in lengths], height, label=f"{code}, {float(step) / 1e3:.4g} ms")
        best = [_number(times.get((code, name)), "roofline_us") / 1e3 for name in shown]
        for place, limit in zip(places, best, strict=False):
            if limit:
                axes.plot([limit, limit], [place - height / 2, place + height / 2], color="black", linewidth=1.2)
    axes.set_yticks(range(len(shown) + 1), [*shown, f"{OTHERS} ({len(others)})"], fontsize=7)
    axes.set_ylim(len(shown) + 0.6, -0.6)
    axes.set_xlabel("ms of a step; black: the machine's roofline", fontsize=7)
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(title, fontsize=9, loc="left")
    # Above the bars, of which the last may reach as far as any.
    axes.legend(fontsize=7, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(codes), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _name(row: Line) -> str:
    return f"{row['operator']} {row['layer']}".strip()


def _number(row: Line | None, column: str) -> float:
    return 0.0 if row is None else float(row[column] or 0.0)
