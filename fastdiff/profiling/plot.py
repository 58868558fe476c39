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
_COLOURS = ("#bdbdbd", "#7fb3e0", "#1f4e9c")
"""Of the last codes; the last is the darkest."""


def check(path: Path) -> None:
    """InputError unless that file can be drawn."""
    if path.suffix.lower().removeprefix(".") not in FORMATS:
        raise InputError(f"plot: expected a name ending in .{', .'.join(FORMATS)}, got {path}")
    if find_spec("matplotlib") is None:
        raise InputError("plot: expected matplotlib, which is not installed: pip install matplotlib")


def draw(rows: Sequence[Line], path: Path, *, layers: int = 24) -> None:
    """A panel for each model, shape and dtype, in it so many of the longest layers, and one bar for all others, each
    with the rate that it reaches. The black line of a bar is the layer's roofline. Codes are told apart by colour, in
    the order of the rows."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels: dict[tuple[str, ...], list[Line]] = {}
    for row in rows:
        panels.setdefault((row["model"], row["shape"], row["dtype"]), []).append(row)
    wide = 2 if len(panels) > 1 else 1
    deep = -(-len(panels) // wide)
    bars = max(len(_codes(measured)) for measured in panels.values()) * (layers + 1)
    figure, axes = pyplot.subplots(
        deep, wide, figsize=(7.5 * wide, (0.11 * bars + 1.1) * deep), layout="constrained", squeeze=False
    )
    for place, (title, measured) in zip(axes.flat, panels.items(), strict=False):
        _panel(place, ", ".join(title), measured, layers)
    for place in axes.flat[len(panels) :]:
        place.set_axis_off()
    figure.suptitle(f"time of a step's layers; {rows[0]['hardware']}, {rows[0]['threads']} threads", fontsize=10)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lower().removeprefix("."), dpi=130)
    pyplot.close(figure)
    write_atomic(path, picture.getvalue())


def _panel(axes: Any, title: str, rows: Sequence[Line], layers: int) -> None:
    codes = _codes(rows)
    found = {(row["code"], _name(row)): row for row in rows}
    names = list(dict.fromkeys(_name(row) for row in rows))
    names.sort(key=lambda name: -max(_number(found.get((code, name)), "time_us") for code in codes))
    shown, others = names[:layers], names[layers:]
    height = 0.86 / len(codes)
    for index, code in enumerate(codes):
        step = next(row["step_us"] for row in rows if row["code"] == code)
        measured = [found.get((code, name)) for name in shown]
        lengths = [_number(row, "time_us") / 1e3 for row in measured]
        lengths.append(sum(_number(found.get((code, name)), "time_us") for name in others) / 1e3)
        places = [place + (index - (len(codes) - 1) / 2) * height for place in range(len(lengths))]
        colour = _COLOURS[(index - len(codes)) % len(_COLOURS)]
        axes.barh(places, lengths, 0.92 * height, color=colour, label=f"{code}, {float(step) / 1e3:.4g} ms")
        for place, length, row in zip(places, lengths, measured, strict=False):
            limit = _number(row, "roofline_us") / 1e3
            if limit:
                axes.plot([limit, limit], [place - height / 2, place + height / 2], color="black", linewidth=1.0)
            text = _rate(row) if length else ""
            axes.annotate(
                text, (max(length, limit), place), (3, 0), textcoords="offset points", va="center", fontsize=6
            )
    axes.set_yticks(range(len(shown) + 1), [*shown, f"{OTHERS} ({len(others)})"], fontsize=8)
    axes.set_ylim(len(shown) + 0.6, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel("ms of a step; black: what the machine's measured rates allow", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    peak = _number(rows[0], "peak_gflops_per_second")
    axes.set_title(title + (f"; the machine reaches {peak:.0f} GFLOP/s" if peak else ""), fontsize=9, loc="left")
    # The longest layers come first, so that there is room under them.
    axes.legend(fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.3), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _codes(rows: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(row["code"] for row in rows))


def _rate(row: Line | None) -> str:
    """What is reached of what bounds the layer."""
    computing = row is not None and row.get("bound") == "compute"
    rate = _number(row, "gflops_per_second" if computing else "gbytes_per_second")
    number = f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
    return f"{number} G{'FLOP' if computing else 'B'}/s" if rate else ""


def _name(row: Line) -> str:
    return f"{row['operator']} {row['layer']}".strip()


def _number(row: Line | None, column: str) -> float:
    return 0.0 if row is None else float(row.get(column) or 0.0)
