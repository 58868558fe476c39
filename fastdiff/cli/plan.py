"""`fastdiff plan`: the numbers of a method's table, row by row."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from typing import Any

from fastdiff import parameterization, samplers, schedules
from fastdiff.cli import options
from fastdiff.errors import InputError
from fastdiff.ops.row import CLIP, INPUT_SCALE, INPUTS, NEW_ANCHOR, NEW_HISTORY, NEW_X, PREDICTION, VARIANCE
from fastdiff.samplers import StepTable
from fastdiff.schedules import Array, Schedule

SCHEDULES = (
    *("linear", "scaled_linear", "sigmoid", "cosine", "laplace", "crash"),
    *("flow", "ve", "edm", "vp_sde", "sub_vp_sde"),
)
DEFAULTS = ("scaled_linear", "flow", "ve", "sub_vp_sde")
"""The schedule that is taken when none is named: the first on which the method is defined."""
PREFERRED = ("edm", "flow", "epsilon", "v", "sample")
STEPS = 10
BLOCKS = {
    "data": ("D =", PREDICTION, ("x", "m")),
    "x": ("x' =", NEW_X, INPUTS),
    "history": ("history' =", NEW_HISTORY, INPUTS),
    "anchor": ("anchor' =", NEW_ANCHOR, INPUTS),
}
EPILOG = """\
Each line is one call of the network. With x the state before it and m what the network gives there:

  D                 the prediction of the data, from x and m
  x'                the next state, from x, m, D, the anchor, up to three earlier values (hist1 the newest) and noise
  history' anchor'  what is kept for later lines
  input             what x' is multiplied by for the network; left out where it is 1 everywhere

A dot is a zero: nothing is read. T is what the network is called with, SIGMA/ALPHA the noise in x against the signal.

Without --schedule it is scaled_linear, that of Stable Diffusion, or one that the method is made for; without
--prediction it is epsilon (the noise), or where the schedule does not go with it: flow, edm, v.

examples:
  fastdiff plan --method dpmpp_2m --steps 10
  fastdiff plan --method heun --schedule cosine --prediction v --option spacing=karras
  fastdiff plan --method ddim --option eta=0.5 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Print the coefficients of a sampling method, one line for each call of the network."
    parser.epilog = EPILOG
    parser.add_argument("--method", default="dpmpp_2m", help="sampling method (default dpmpp_2m)")
    parser.add_argument("--steps", type=int, metavar="N", help=f"steps (default {STEPS})")
    parser.add_argument("--schedule", choices=SCHEDULES, metavar="NAME", help=f"one of {', '.join(SCHEDULES)}")
    parser.add_argument(
        "--prediction", metavar="NAME", help=f"what the network gives: {', '.join(parameterization.PREDICTIONS)}"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the method, such as eta=0.5"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def main(arguments: argparse.Namespace) -> int:
    info = samplers.find(arguments.method)
    chosen = options.parse(arguments.option, arguments.method)
    schedule = _schedule(arguments.schedule, info)
    given = "timesteps" in chosen or "sigmas" in chosen
    table = samplers.build(
        info.name,
        schedule=schedule,
        steps=STEPS if arguments.steps is None and not given else arguments.steps,
        prediction=arguments.prediction or _prediction(schedule),
        **chosen,
    )
    print(json.dumps(described(table, schedule)) if arguments.json else page(table, schedule))
    return 0


def described(table: StepTable, schedule: Schedule) -> dict[str, Any]:
    """The table as plain data; a coefficient that is zero, and a clip or a ratio that is infinite, are left out."""
    rows = []
    for row, timestep, level in zip(table.rows, table.timesteps.tolist(), table.levels.tolist(), strict=True):
        blocks = {name: _nonzero(row[where], names) for name, (_, where, names) in BLOCKS.items()}
        numbers = {"timestep": timestep, "signal": level[0], "noise": level[1], "input_scale": float(row[INPUT_SCALE])}
        bounds = {"clip": float(row[CLIP])} if math.isfinite(row[CLIP]) else {}
        rows.append(numbers | bounds | blocks)
    return {
        "method": table.method,
        "schedule": schedule.to_config(),
        "prediction": table.prediction,
        "steps": table.steps,
        "evaluations": len(table),
        "init_scale": table.init_scale,
        "first_input_scale": table.first_input_scale,
        "rows": rows,
    }


def page(table: StepTable, schedule: Schedule) -> str:
    """The table as a page of text: columns that are zero in every row are left out."""
    columns = [("", "ROW", [str(index) for index in range(len(table))])]
    columns.append(("", "T", [f"{round(t, 9):.6g}" for t in table.timesteps.tolist()]))
    ratios = [noise / signal if signal else math.inf for signal, noise in table.levels.tolist()]
    columns.append(("", "SIGMA/ALPHA", [_number(ratio) for ratio in ratios]))
    for name, (title, where, names) in BLOCKS.items():
        if name == "data" and not _reads_data(table):
            continue
        block = table.rows[:, where]
        used = [(input_, block[:, i].tolist()) for i, input_ in enumerate(names) if block[:, i].any()]
        columns += [(title, input_, [_number(value) for value in values]) for input_, values in used]
    scales = table.rows[:, INPUT_SCALE]
    if (scales[:-1] != 1.0).any() or table.first_input_scale != 1.0:
        columns.append(("", "input", [*(_number(value) for value in scales[:-1].tolist()), "."]))
    return "\n".join([*_caption(table, schedule), "", *_aligned(columns)])


def _caption(table: StepTable, schedule: Schedule) -> list[str]:
    calls = f"{len(table)} call{'s' if len(table) > 1 else ''} of the network"
    start = f"{table.init_scale:.6g} * noise" if table.init_level[1] else "the image"
    lines = [
        f"{table.method}: {table.steps} step{'s' if table.steps > 1 else ''}, {calls}; "
        f"{table.prediction} network on {schedule.name} ({schedule.steps} timesteps)",
        f"starts as {start}; the network is given {table.first_input_scale:.6g} * x",
    ]
    clip = table.rows[:, CLIP].min()
    if math.isfinite(clip):
        lines.append(f"D is bounded by {clip:g}")
    if table.threshold is not None:
        lines.append(f"D is bounded by the quantile of |D| at {table.threshold.percentile:g}")
    if table.rows[:, VARIANCE].any():
        lines.append("noise is multiplied by what the network says of the variance")
    if table.snr.any():
        lines.append(f"Langevin rows, signal-to-noise ratio {table.snr.max():g}: their step follows from the norms")
    return lines


def _aligned(columns: Sequence[tuple[str, str, Sequence[str]]]) -> list[str]:
    """Right-aligned columns (group, name, cells); each group's name stands over its first column."""
    widths = [max(len(name), *map(len, cells)) for _, name, cells in columns]
    groups, places, at = "", [], 0
    for (group, _, _), width in zip(columns, widths, strict=True):
        places.append((group, at))
        at += width + 2
    previous = ""
    for group, place in places:
        if group != previous and group:
            groups = groups.ljust(place) + group + " "
        previous = group
    rows = zip(*([name, *cells] for _, name, cells in columns), strict=True)
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [groups.rstrip(), *lines]


def _reads_data(table: StepTable) -> bool:
    return any(table.rows[:, where.start + INPUTS.index("D")].any() for where in (NEW_X, NEW_HISTORY, NEW_ANCHOR))


def _number(value: float) -> str:
    return "." if value == 0.0 else f"{value:.4g}"


def _nonzero(values: Array, names: Sequence[str]) -> dict[str, float]:
    return {name: value for name, value in zip(names, values.tolist(), strict=True) if value != 0.0}


def _schedule(name: str | None, info: samplers.MethodInfo) -> Schedule:
    if name is not None:
        return schedules.from_config({"name": name})
    fitting = [schedules.from_config({"name": default}) for default in DEFAULTS]
    return next(schedule for schedule in fitting if not info.kinds or schedule.kind in info.kinds)


def _prediction(schedule: Schedule) -> str:
    """What networks on this schedule mostly give, and can give at its noisiest timestep."""
    for prediction in PREFERRED:
        try:
            parameterization.check(prediction, schedule)
            parameterization.data(prediction, float(schedule.alphas[-1]), float(schedule.sigmas[-1]))
        except InputError:
            continue
        return prediction
    raise InputError(f"prediction: expected one for {schedule.name!r}, got none")
