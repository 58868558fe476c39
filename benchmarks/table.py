"""The README's table, made from a CSV: `python -m benchmarks.table [--readme] [CSV]`."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import fresh, record
from benchmarks.compilers import COMPILED, FROZEN
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


COMPILERS = (COMPILED, FROZEN)

TABLES = {
    "operators": "",
    "network": (
        "A call of an accelerated network, against diffusers' own in both memory formats, OpenVINO, and\n"
        "`torch.compile` (the faster of it and of it with frozen weights, beside which fastdiff is measured again).\n"
        "`errors` are its distance from the float64 result and, in brackets, that of diffusers' own in that dtype:"
    ),
    "compiled": (
        "The same against `torch.compile`, and with its weights frozen; what the first call takes with all that is\n"
        "made ready in it:"
    ),
    "first_call": (
        "A network in a process of its own: its first call, and the most memory that it needs for weights, their\n"
        "copies and three calls; under `copies`, how much more than diffusers' that is, in copies of its weights.\n"
        f"The aims are a first call of at most {fresh.SECONDS:g} s and one copy; what misses them is bold:"
    ),
    "rewrite": (
        "A call without one rewrite and with all; under `alone`, how much faster a network without rewrites, but for\n"
        "those that this one needs, gets by it:"
    ),
}


def _head(words: Sequence[str], *numbers: str) -> str:
    """A table's first lines: columns of words, then of numbers."""
    aligned = "|".join(["---"] * len(words) + ["--:"] * len(numbers))
    return f"| {' | '.join((*words, *numbers))} |\n|{aligned}|".replace("|  |", "| |", 1)


_CALL = ("", "shape", "dtype")
HEADS = {
    "operators": _head((*_CALL, "baseline"), "time", "fastdiff", "speed-up", "share of roofline"),
    "network": _head(
        _CALL,
        *("diffusers", "channels-last", "torch.compile", "OpenVINO", "fastdiff"),
        *("× diffusers", "× diffusers float32", "× torch.compile", "× OpenVINO", "errors", "share of roofline"),
    ),
    "compiled": _head(
        _CALL,
        *("torch.compile", "frozen", "fastdiff", "× the faster"),
        *("first call: torch.compile", "frozen", "fastdiff"),
    ),
    "first_call": _head(
        _CALL,
        *("first call: diffusers", "fastdiff", "memory: diffusers", "fastdiff", "weights", "copies"),
    ),
    "rewrite": _head(("", "network", "shape", "dtype"), "without", "with all", "speed-up", "alone"),
}


def line(row: Row) -> str:
    """A row for people who watch the run."""
    share = f"{float(row['roofline_share']):7.0%}" if row["roofline_share"] else " " * 7
    mark = "*" if row["chosen"] == "yes" else " "
    return (
        f"{row['case']:<56} {row['contender']:<23}{mark} {float(row['p50_us']):12.1f} us {row['speedup']:>7}x"
        f" {share} of roofline"
    )


def markdown(rows: Sequence[Row]) -> str:
    """A line for each case that fastdiff's choice has a time for; networks and rewrites in tables of their own."""
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["contender"]] = row
    lines: dict[str, list[str]] = {}
    for measured in cases.values():
        ours = next((row for row in measured.values() if row["chosen"] == "yes"), None)
        if ours is not None:
            kind = ours["operator"] if ours["operator"] in TABLES else "operators"
            compiled = cases.get(ours["case"].replace("network/", "compiled/"), {})
            cells = _network(measured, ours, compiled) if kind == "network" else _CELLS[kind](measured, ours)
            lines.setdefault(kind, []).append(f"| {' | '.join(cells)} |")
    tables = (("\n\n".join(filter(None, (TABLES[kind], HEADS[kind]))), lines[kind]) for kind in TABLES if kind in lines)
    return "\n\n".join("\n".join((head, *body)) for head, body in tables)


def _operator(measured: Mapping[str, Row], ours: Row) -> tuple[str, ...]:
    baseline = next(iter(measured.values()))
    what = f"`{ours['operator']}` {LAYOUTS.get(ours['variant'], ours['variant'])}"
    return what, ours["shape"], ours["dtype"], baseline["contender"], _time(baseline), *_reached(ours)


def _network(measured: Mapping[str, Row], ours: Row, compiled: Mapping[str, Row]) -> tuple[str, ...]:
    """compiled: the rows of the same network beside torch.compile, in turns of their own."""
    baseline, wide = measured.get("diffusers"), measured.get("diffusers float32")
    if ours["dtype"] == "float32":
        wide = baseline
    peer = _compiler(compiled)
    beside = next((row for row in compiled.values() if row["chosen"] == "yes"), ours)
    openvino = measured.get("openvino")
    times = map(_time, (baseline, measured.get("diffusers channels-last"), peer, openvino, ours))
    faster = (_faster(baseline, ours), _faster(wide, ours), _faster(peer, beside), _faster(openvino, ours))
    errors = ours["relative_error"] + (f" ({baseline['relative_error']})" if baseline else "")
    share = _reached(ours)[-1]
    return f"`{ours['variant']}`", ours["shape"], ours["dtype"], *times, *faster, errors, share


def _compiled(measured: Mapping[str, Row], ours: Row) -> tuple[str, ...]:
    peers = [measured.get(who) for who in COMPILERS]
    firsts = (f"{float(row['first_call_s']):.3g} s" if row else "" for row in (*peers, ours))
    what = f"`{ours['variant']}`", ours["shape"], ours["dtype"]
    return *what, *map(_time, peers), _time(ours), _faster(_compiler(measured), ours), *firsts


def _compiler(measured: Mapping[str, Row]) -> Row | None:
    """The fastest of them."""
    found = (measured[who] for who in COMPILERS if who in measured)
    return min(found, key=lambda row: float(row["p50_us"]), default=None)


def _first_call(measured: Mapping[str, Row], ours: Row) -> tuple[str, ...]:
    baseline = measured["diffusers"]
    weights = float(ours["weight_mbytes"])
    more = (float(ours["peak_mbytes"]) - float(baseline["peak_mbytes"])) / weights
    memory = (f"{float(size):.0f} MB" for size in (baseline["peak_mbytes"], ours["peak_mbytes"], weights))
    what = f"`{ours['variant']}`", ours["shape"], ours["dtype"]
    first = _aimed(_time(ours), float(ours["p50_us"]) <= fresh.SECONDS * 1e6)
    return *what, _time(baseline), first, *memory, _aimed(f"{more:.2f}", round(more, 2) <= fresh.COPIES)


def _aimed(cell: str, reached: bool) -> str:
    return cell if reached else f"**{cell}**"


def _rewrite(measured: Mapping[str, Row], ours: Row) -> tuple[str, ...]:
    rewrite, _, network = ours["variant"].rpartition("-")
    none, only = (measured.get(who) for who in ("none", "only"))
    alone = f"{float(none['p50_us']) / float(only['p50_us']):.2f}" if none and only else ""
    times = (_time(measured.get("without")), _time(ours))
    return f"`{rewrite}`", network, ours["shape"], ours["dtype"], *times, f"{float(ours['speedup']):.2f}", alone


_CELLS = {
    "operators": _operator,
    "compiled": _compiled,
    "first_call": _first_call,
    "rewrite": _rewrite,
}


def _faster(row: Row | None, ours: Row) -> str:
    """How many times as fast as that row we are."""
    return "" if row is None else f"{float(row['p50_us']) / float(ours['p50_us']):.2f}"


def _reached(ours: Row) -> tuple[str, str, str]:
    share = f"{float(ours['roofline_share']):.0%}" if ours["roofline_share"] else ""
    return _time(ours), f"{float(ours['speedup']):.1f}", share


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


def _time(row: Row | None) -> str:
    if row is None:
        return ""
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
