"""Profiles as text, and as lines of a CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastdiff.files import write_atomic
from fastdiff.profiling.measure import Profile, Row

__all__ = ["COLUMNS", "Line", "lines", "page", "read", "write"]

Line = Mapping[str, str]

COLUMNS = (
    *("model", "shape", "dtype", "threads", "hardware", "code", "step_us", "operator", "layer", "calls", "time_us"),
    *("share", "gflop", "gbyte", "gflops_per_second", "gbytes_per_second", "roofline_us", "roofline_share", "bound"),
    "peak_gflops_per_second",
)
_HEAD = ("calls", "time", "share", "GFLOP/s", "GB/s", "roofline", "bound")


def page(code: str, profile: Profile, *, longest: int) -> str:
    """A step's operators, and its longest layers. code: whose network it is."""
    step = f"{code}: a step takes {_time(profile.seconds)}"
    if profile.flops:
        rate = profile.flops / profile.seconds
        step += f", {rate / 1e9:.0f} GFLOP/s; the machine's peak is {profile.peak / 1e9:.0f}"
    shown = profile.rows[:longest]
    parts = [_aligned("operator", profile.operators(), profile.profiled), _aligned("layer", shown, profile.profiled)]
    left = profile.rows[longest:]
    if left:
        parts[-1] += f"\n... {len(left)} more, {sum(row.seconds for row in left) / profile.profiled:.1%}"
    return "\n\n".join((step, *parts))


def lines(profile: Profile, facts: Line) -> list[Line]:
    """A line for each layer. facts: the columns that are equal in all of them."""
    return [
        {
            **facts,
            "step_us": _short(profile.seconds * 1e6),
            "operator": row.operator,
            "layer": row.shape,
            "calls": str(row.calls),
            "time_us": _short(row.seconds * 1e6),
            "share": f"{row.seconds / profile.profiled:.4f}",
            "gflop": _short(row.flops / 1e9),
            "gbyte": _short(row.bytes / 1e9),
            "gflops_per_second": _short(_rate(row.flops, row)),
            "gbytes_per_second": _short(_rate(row.bytes, row)),
            "roofline_us": _short(row.best * 1e6),
            "roofline_share": _short(_rate(row.best * 1e9, row)),
            "bound": bound(row),
            "peak_gflops_per_second": _short(profile.peak / 1e9),
        }
        for row in profile.rows
    ]


def write(path: Path, rows: Sequence[Line]) -> None:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, buffer.getvalue().encode())


def read(path: Path) -> list[Line]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def bound(row: Row) -> str:
    """What keeps the layer from being faster: operations or bytes; nothing where neither is counted."""
    return "" if row.best == 0 else "compute" if row.computing else "memory"


def _aligned(title: str, rows: Sequence[Row], whole: float) -> str:
    cells = [
        (
            row.name,
            str(row.calls or ""),
            _time(row.seconds),
            f"{row.seconds / whole:.1%}",
            f"{_rate(row.flops, row):.0f}" if row.flops else "",
            f"{_rate(row.bytes, row):.1f}" if row.bytes else "",
            f"{_rate(row.best * 1e9, row):.0%}" if row.best else "",
            bound(row),
        )
        for row in rows
    ]
    table = [(title, *_HEAD), *cells]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    aligned = (
        "  ".join((line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))))
        for line in table
    )
    return "\n".join(line.rstrip() for line in aligned)


def _rate(amount: float, row: Row) -> float:
    """In 1e9 a second."""
    return amount / row.seconds / 1e9 if row.seconds > 0 else 0.0


def _time(seconds: float) -> str:
    return (
        f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else _microseconds(seconds)
    )


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} us"


def _short(value: float) -> str:
    """Four significant digits; nothing for what is not counted."""
    return "" if value == 0 else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
