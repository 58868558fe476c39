"""The README's table, made from a CSV: `python -m benchmarks.table [--readme] [CSV]`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import record
from benchmarks.record import ROOT, Row
from fastdiff.files import write_atomic

BEGIN, END = "<!-- table of {name}, made by python -m benchmarks.table --readme -->", "<!-- end of table -->"
MARKED = re.compile(r"<!-- table of (\S+), made by .*? -->\n(.*?)<!-- end of table -->", re.DOTALL)
LAYOUTS = {
    "contiguous": "NCHW",
    "channels_last": "channels-last",
    "contiguous_of_two": "NCHW, two inputs",
    "channels_last_of_two": "channels-last, two inputs",
}


def line(row: Row) -> str:
    """A row for people who watch the run."""
    share = f"{float(row['roofline_share']):7.0%}" if row["roofline_share"] else " " * 7
    mark = "*" if row["chosen"] == "yes" else " "
    return (
        f"{row['case']:<52} {row['contender']:<20}{mark} {float(row['p50_us']):12.1f} us {row['speedup']:>7}x"
        f" {share} of roofline"
    )


def markdown(rows: Sequence[Row]) -> str:
    """One line per case: its baseline, the backend that fastdiff chooses there, and how much faster that is."""
    cases: dict[str, list[Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    lines = [
        "| | shape | dtype | baseline | time | fastdiff | speed-up | share of roofline |",
        "|---|---|---|---|--:|--:|--:|--:|",
    ]
    for measured in cases.values():
        baseline = measured[0]
        ours = next((row for row in measured if row["chosen"] == "yes"), None)
        if ours is None:
            continue
        what = f"`{baseline['operator']}` {LAYOUTS.get(baseline['variant'], baseline['variant'])}"
        share = f"{float(ours['roofline_share']):.0%}" if ours["roofline_share"] else ""
        lines.append(
            f"| {what} | {baseline['shape']} | {baseline['dtype']} | {baseline['contender']} | {_time(baseline)} "
            f"| {_time(ours)} | {float(ours['speedup']):.1f} | {share} |"
        )
    return "\n".join(lines)


def caption(rows: Sequence[Row]) -> str:
    first = rows[0]
    where = first["hardware"] if first["device"] == "cuda" else f"{first['hardware']}, {first['threads']} threads"
    return (
        f"{where}, {first['cpu_capability']}; PyTorch {first['torch']}, diffusers {first['diffusers']}, "
        f"Python {first['python']}; {first['date']}."
    )


def section(path: Path) -> str:
    """What stands between the README's marks for this CSV."""
    rows = record.read(path)
    begin = BEGIN.format(name=path.relative_to(ROOT))
    return f"{begin}\n{markdown(rows)}\n\n{caption(rows)}\n{END}"


def update(readme: str, path: Path) -> str:
    """The README's text with its table made anew from that CSV."""
    if not MARKED.search(readme):
        raise SystemExit(f"README.md: expected the marks {BEGIN!r} and {END!r}")
    return MARKED.sub(lambda _: section(path), readme)


def _time(row: Row) -> str:
    microseconds = float(row["p50_us"])
    for unit, factor in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= factor:
            return f"{microseconds / factor:.3g} {unit}"
    return f"{microseconds:.3g} us"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("csv", nargs="?", type=Path, help="default: the one that the README names")
    parser.add_argument("--readme", action="store_true", help="write the table into README.md")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    named = MARKED.search(text)
    if arguments.csv is None and named is None:
        parser.error("expected a CSV file, since README.md names none")
    path = (arguments.csv or ROOT / named[1]).resolve()  # type: ignore[index]
    if arguments.readme:
        write_atomic(readme, update(text, path).encode())
    else:
        sys.stdout.write(section(path) + "\n")


if __name__ == "__main__":
    main()
