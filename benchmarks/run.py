"""`fastdiff bench`, `python -m benchmarks.run`: measure, write a CSV, and say what came out."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

import torch

import fastdiff
from benchmarks import accelerated, cases, drop_in, fresh, gate, measure, operators, record, sampling, table
from benchmarks.cases import Case
from benchmarks.work import AUTOMATIC, OURS, Contender, Work
from fastdiff.errors import BackendError, CheckpointError, InputError

NETWORKS = ("network", "compiled", "rewrite", "sampling")
EPILOG = """\
Contenders take turns in one process; the figures are medians. A contender whose results are wrong, or that other
programs disturbed all the time, gets no row, and the exit status is then 1. Rows of a case measured again replace the
old ones, so a CSV can be made in parts with --filter.

examples:
  fastdiff bench --quick
  fastdiff bench --filter sampler_step
  fastdiff bench --filter network/,rewrite/    accelerated networks, and what each rewrite gains
  fastdiff bench --filter network/,first_call/    the networks against all others: 15 minutes
  fastdiff bench --filter compiled/            every network against torch.compile: a minute of compiling for each
  fastdiff bench --filter group_norm_silu --compare benchmarks/results/earlier.csv
  python -m benchmarks.table --readme       makes the README's table anew
  python -m benchmarks.plot FILE.csv        draws it
"""


SHORTER = {"drop_in": 0.5}
"""Share of the seconds for a case of an operator that has many."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Measure the operators, accelerated networks and the sampling loop against PyTorch and diffusers."
    )
    parser.epilog = EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--filter", metavar="WORDS", help="only cases whose name contains one of these (a,b,...)")
    parser.add_argument("--quick", action="store_true", help="few cases, little time: a look, not a measurement")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--threads", type=int, metavar="N", help="processor threads (default: one per core)")
    parser.add_argument("--seconds", type=float, metavar="S", help="time for each case (default 2, quick 0.2)")
    parser.add_argument("--out", metavar="CSV", help="default: benchmarks/results/<date>-<hardware>.csv; quick: none")
    parser.add_argument("--compare", metavar="CSV", help="print how the medians changed since that file")


def main(arguments: argparse.Namespace) -> int:
    device = _device(arguments.device)
    for name in ("threads", "seconds"):
        value = getattr(arguments, name)
        if value is not None and not value > 0:
            raise InputError(f"{name}: expected a positive number, got {value}")
    chosen = cases.select(arguments.filter, quick=arguments.quick)
    if not chosen:
        raise InputError(f"filter: no case's name contains {arguments.filter!r}")
    if arguments.compare is not None and not Path(arguments.compare).is_file():
        raise InputError(f"compare: expected a CSV file, got {arguments.compare}")
    torch.set_num_threads(arguments.threads or os.cpu_count() or 1)
    facts = record.environment(device)
    out = Path(arguments.out) if arguments.out else None if arguments.quick else record.default_path(facts)
    seconds = arguments.seconds or (0.2 if arguments.quick else 2.0)
    old = record.read(out) if out is not None and out.is_file() else []
    rows: list[record.Row] = []
    red = 0
    start = time.perf_counter()
    for index, case in enumerate(chosen, 1):
        print(f"{time.perf_counter() - start:5.0f} s  {index}/{len(chosen)}  {case.name}", file=sys.stderr, flush=True)
        measured, failures = run_case(case, device, seconds=seconds, facts=facts)
        rows += measured
        red += failures
        for row in measured:
            print(table.line(row), flush=True)
        if out is not None:
            record.write(out, record.merge(old, rows, [case.name for case in cases.CASES]))
    if out is not None:
        print(f"{out}: {len(rows)} rows")
    if arguments.compare is not None:
        print("\n".join(record.compare(record.read(Path(arguments.compare)), rows)))
    return 1 if red else 0


def run_case(
    case: Case, device: torch.device, *, seconds: float, facts: record.Row
) -> tuple[list[dict[str, str]], int]:
    """The rows of a case and the number of contenders that have none: wrong results, or no rest to measure in."""
    if case.operator == "first_call":
        return _in_fresh_processes(case, device, facts)
    # In inference mode networks remember nothing from one call to the next; pipelines do not call them in it.
    with torch.no_grad() if case.operator in NETWORKS else torch.inference_mode():
        work = _build(case, device)
        if work is None:
            return [], 0
        contenders, errors, red = _admitted(case, work, device)
        used = _chosen(case, work)
        timings = measure.interleave(contenders, device, seconds=seconds * SHORTER.get(case.operator, 1.0))
        best = measure.roofline(work.traffic, work.flops, case.dtype, device)
    if case.operator == "compiled":
        torch._dynamo.reset()
    red += len(contenders) - len(timings)
    for contender in contenders:
        if contender.name not in timings:
            print(f"{case.name}: {contender.name}: not measured: the machine was too busy", file=sys.stderr)
    # Without its baseline, or with nothing else, a case has no speed to tell, and earlier rows of it stay.
    baseline = timings.get(next(iter(work.peers)))
    firsts = {contender.name: contender.first for contender in contenders}
    if baseline is None or len(timings) == 1:
        return [], red
    rows = [
        record.row(
            case,
            name,
            timing,
            chosen=name == OURS + used,
            baseline=baseline,
            traffic=work.traffic,
            flops=work.flops,
            steps=work.steps,
            best=best,
            error=errors[name],
            first=firsts[name],
            facts=facts,
        )
        for name, timing in timings.items()
    ]
    return rows, red


def _in_fresh_processes(case: Case, device: torch.device, facts: record.Row) -> tuple[list[dict[str, str]], int]:
    """A row for diffusers and for us, as `run_case`; the time is that of the one first call. Too much memory is wrong,
    and has its row all the same."""
    if device.type != "cpu" or importlib.util.find_spec("diffusers") is None:
        _skip(case, "it is measured on the CPU, beside diffusers")
        return [], 0
    rows: list[dict[str, str]] = []
    timings: list[measure.Timing] = []
    both: list[dict[str, float]] = []
    for name in (fresh.LIBRARY, fresh.OURS):
        try:
            found = fresh.measure(case, name, threads=torch.get_num_threads())
        except ChildProcessError as error:
            print(f"{case.name}: {name}: not measured: {error}", file=sys.stderr)
            return [], 1
        both.append(found)
        first = found["first"]
        timings.append(measure.Timing(first, first, first, 1, 1, 0.0))
        made = record.row(
            case,
            name,
            timings[-1],
            chosen=name == fresh.OURS,
            baseline=timings[0],
            traffic=0,
            flops=0,
            steps=0,
            best=0.0,
            error=None,
            first=first,
            facts=facts,
        )
        megabytes = {
            f"{what}_mbytes": record.short(found[of] / 1e6) for what, of in (("peak", "peak"), ("weight", "weights"))
        }
        rows.append(made | megabytes)
    wrong = fresh.too_much(*both)
    if wrong is not None:
        print(f"{case.name}: {fresh.OURS}: wrong: {wrong}", file=sys.stderr)
    return rows, int(wrong is not None)


def _build(case: Case, device: torch.device) -> Work | None:
    if case.operator in operators.BUILDERS:
        return operators.BUILDERS[case.operator](case, device)
    if importlib.util.find_spec("diffusers") is None:
        return _skip(case, "diffusers is not installed")
    if case.operator == "drop_in":
        return drop_in.build(case, device)
    if case.operator in ("network", "compiled", "rewrite"):
        return accelerated.build(case, device)
    try:
        return sampling.build(case, device)
    except CheckpointError as error:
        return _skip(case, str(error))


def _skip(case: Case, reason: str) -> None:
    print(f"{case.name}: left out: {reason}", file=sys.stderr)


def _admitted(case: Case, work: Work, device: torch.device) -> tuple[list[Contender], dict[str, float | None], int]:
    """The contenders that can run and are right, their errors, and how many are wrong."""
    admitted, errors, red = [], {}, 0
    for contender in work.contenders():
        if contender.backend == "triton" and device.type == "cpu":
            continue
        try:
            error, wrong = gate.check(contender, work, case.dtype)
        except BackendError:
            continue
        if wrong is not None:
            print(f"{case.name}: {contender.name}: wrong, not measured: {wrong}", file=sys.stderr)
            red += 1
            continue
        admitted.append(contender)
        errors[contender.name] = error
    return admitted, errors, red


def _chosen(case: Case, work: Work) -> str:
    """The backend that runs the case where none is demanded."""
    if AUTOMATIC in work.backends:
        return AUTOMATIC
    fastdiff.report(reset=True)
    work.ours()
    return next(backend for operator, backend in fastdiff.report().calls if operator == case.operator)


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise InputError(f"device: expected cpu or cuda, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device: expected cpu, since PyTorch finds no NVIDIA GPU here, got cuda")
    return torch.device(name, 0) if name == "cuda" else torch.device(name)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(prog="python -m benchmarks.run")
    add_arguments(_parser)
    try:
        sys.exit(main(_parser.parse_args()))
    except (InputError, BackendError) as _error:
        _parser.exit(2, f"{_parser.prog}: error: {_error}\n")
