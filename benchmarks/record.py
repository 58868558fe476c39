"""A row of the CSV: what was measured, on what, and what came out. Files are read, merged and compared here."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import io
import platform
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch

import fastdiff
from benchmarks.cases import Case
from benchmarks.measure import Timing
from fastdiff.cli.info import processor
from fastdiff.files import write_atomic
from fastdiff.ops import native

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
COLUMNS = (
    *("case", "operator", "variant", "shape", "dtype", "contender", "chosen"),
    *("p20_us", "p50_us", "p80_us", "rounds", "calls", "disturbed", "speedup", "steps_per_second"),
    *("gbytes_per_second", "gflops_per_second", "roofline_share", "relative_error"),
    *("first_call_s", "peak_mbytes", "weight_mbytes"),
    *("device", "hardware", "threads", "cpu_capability", "date", "commit"),
    *("fastdiff", "python", "torch", "triton", "diffusers", "openvino"),
)
Row = Mapping[str, str]


def environment(device: torch.device) -> dict[str, str]:
    """The columns that are equal in every row of a run."""
    packages = {name: _version(name) for name in ("triton", "diffusers", "openvino")}
    return {
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": str(torch.get_num_threads()),
        "cpu_capability": native.capability(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit(),
        "fastdiff": fastdiff.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **packages,
    }


def commit() -> str:
    """The commit of the checkout, with "+changes" where tracked files besides results differ from it."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def default_path(facts: Row) -> Path:
    """benchmarks/results/<date>-<hardware>.csv."""
    hardware = facts["hardware"] if facts["device"] == "cuda" else f"{facts['hardware']}-{facts['threads']}-threads"
    return RESULTS / f"{facts['date']}-{re.sub('[^a-z0-9]+', '-', hardware.lower()).strip('-')}.csv"


def row(
    case: Case,
    contender: str,
    timing: Timing,
    *,
    chosen: bool,
    baseline: Timing,
    traffic: int,
    flops: int,
    steps: int,
    best: float,
    error: float | None,
    first: float | None,
    facts: Row,
) -> dict[str, str]:
    """One line of the CSV; rates and the share of the roofline belong to the median. best: the roofline's seconds."""
    seconds = timing.p50
    return {
        "case": case.name,
        "operator": case.operator,
        "variant": case.variant,
        "shape": "x".join(map(str, case.shape)),
        "dtype": case.dtype,
        "contender": contender,
        "chosen": "yes" if chosen else "no",
        "p20_us": short(timing.p20 * 1e6),
        "p50_us": short(seconds * 1e6),
        "p80_us": short(timing.p80 * 1e6),
        "rounds": str(timing.rounds),
        "calls": str(timing.calls),
        "disturbed": f"{timing.disturbed:.2f}",
        "speedup": short(baseline.p50 / seconds),
        "steps_per_second": short(steps / seconds),
        "gbytes_per_second": short(traffic / seconds / 1e9),
        "gflops_per_second": short(flops / seconds / 1e9),
        "roofline_share": short(best / seconds),
        "relative_error": "" if error is None else f"{error:.2e}",
        "first_call_s": "" if first is None else short(first),
        **facts,
    }


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows, in the order of the cases they belong to."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, buffer.getvalue().encode())


def merge(old: Sequence[Row], new: Sequence[Row], order: Sequence[str]) -> list[Row]:
    """The old rows without the cases that were measured again, and the new ones; in the order of the case names."""
    again = {row["case"] for row in new}
    rows = [*(row for row in old if row["case"] not in again), *new]
    place = {name: index for index, name in enumerate(order)}
    return sorted(rows, key=lambda row: place.get(row["case"], len(place)))


def compare(old: Sequence[Row], new: Sequence[Row]) -> list[str]:
    """A line for each contender that both have: its medians and how much faster it became."""
    before = {(row["case"], row["contender"]): row for row in old}
    lines = []
    for now in new:
        then = before.get((now["case"], now["contender"]))
        if then is not None:
            change = float(then["p50_us"]) / float(now["p50_us"])
            name = f"{now['case']} {now['contender']}"
            lines.append(f"{name:<72} {then['p50_us']:>10} us -> {now['p50_us']:>10} us   {change:5.2f}x")
    return lines


def short(value: float) -> str:
    """Four significant digits; nothing for what was not counted."""
    return f"{value:.4g}" if 0 < value < 1e4 else "" if value == 0 else f"{value:.0f}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
