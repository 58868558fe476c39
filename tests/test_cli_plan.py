"""`fastdiff plan` and `fastdiff methods`: the numbers of a table for people, and the registry for documents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastdiff import cli, samplers, schedules
from fastdiff.cli import methods, plan
from fastdiff.ops.row import INPUTS, NEW_ANCHOR, NEW_HISTORY, NEW_X, PREDICTION

README = Path(samplers.__file__).parent / "README.md"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def cells(out: str) -> tuple[list[str], list[list[str]]]:
    """The names of the columns and the rows below them."""
    head, *rows = out.partition("ROW")[2].splitlines()
    return ["ROW", *head.split()], [row.split() for row in rows]


def test_a_page_shows_the_table(capsys):
    """Every coefficient, to four digits, under the name of its input."""
    status, out, _ = run(capsys, "plan", "--method", "dpmpp_2m", "--steps", 6)
    table = samplers.build("dpmpp_2m", schedule=schedules.scaled_linear(), steps=6)
    assert status == 0
    assert "6 steps, 6 calls of the network; epsilon network on scaled_linear" in out
    heads, rows = cells(out)
    assert heads == ["ROW", "T", "SIGMA/ALPHA", "x", "m", "x", "D", "hist1", "D"]
    shown = np.array([[0.0 if cell == "." else float(cell) for cell in row] for row in rows])
    ratio = table.levels[:, 1] / table.levels[:, 0]
    blocks = [table.rows[:, PREDICTION], table.rows[:, NEW_X][:, [0, 2, 4]], table.rows[:, NEW_HISTORY][:, [2]]]
    expected = np.column_stack([np.arange(6), table.timesteps, ratio, *blocks])
    np.testing.assert_allclose(shown, expected, rtol=6e-4)


def test_columns_stand_under_their_names(capsys):
    """The titles of the groups over their first column, numbers flush right."""
    _, out, _ = run(capsys, "plan", "--method", "heun", "--steps", 3, "--schedule", "cosine", "--prediction", "v")
    titles, head, *rows = out.splitlines()[3:]
    assert all(len(row) == len(head) for row in rows)
    assert head.endswith("input")
    # "anchor' =" stands over the second x after that of "x' =".
    places = [index for index, letter in enumerate(head) if letter == "x"]
    assert titles.index("D =") < places[0] <= titles.index("x' =") < places[1] <= titles.index("anchor' =") < places[2]
    assert len(rows) == 5, "two calls a step, one in the last"
    assert "3 steps, 5 calls" in out


def test_what_a_method_does_not_use_is_left_out(capsys):
    _, out, _ = run(capsys, "plan", "--method", "flow_euler", "--steps", 2)
    assert cells(out)[0] == ["ROW", "T", "SIGMA/ALPHA", "x", "m"]
    assert "flow network on flow" in out
    assert "inf" in out


@pytest.mark.parametrize("method", samplers.methods())
def test_every_method_has_a_plan(capsys, method):
    """As text of bearable width, and as JSON that gives the table back."""
    status, out, err = run(capsys, "plan", "--method", method, "--steps", 4)
    assert (status, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 200
    status, out, _ = run(capsys, "plan", "--method", method, "--steps", 4, "--json")
    found = json.loads(out)
    schedule = schedules.from_config(found["schedule"])
    table = samplers.build(method, schedule=schedule, steps=4, prediction=found["prediction"])
    assert found["evaluations"] == len(table) == len(found["rows"])
    for row, given in zip(table.rows, found["rows"], strict=True):
        for name, where in (("x", NEW_X), ("history", NEW_HISTORY), ("anchor", NEW_ANCHOR)):
            assert [given[name].get(input_, 0.0) for input_ in INPUTS] == row[where].tolist()
        assert [given["data"].get("x", 0.0), given["data"].get("m", 0.0)] == row[PREDICTION].tolist()


@pytest.mark.parametrize("schedule", plan.SCHEDULES)
def test_every_schedule_has_a_prediction(capsys, schedule):
    status, out, err = run(capsys, "plan", "--method", "dpmpp_2m", "--schedule", schedule, "--steps", 3)
    assert (status, err) == (0, "")
    assert f"network on {schedule}" in out


def test_options_reach_the_table(capsys):
    _, out, _ = run(capsys, "plan", "--method", "ddim", "--option", "timesteps=[900, 500, 100]", "--option", "clip=2")
    assert "3 steps" in out
    assert "D is bounded by 2" in out
    assert [row[1] for row in cells(out)[1]] == ["900", "500", "100"]
    _, out, _ = run(capsys, "plan", "--option", "dynamic_threshold=0.995", "--steps", 2)
    assert "quantile of |D| at 0.995" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "ddmi"], "no method 'ddmi'"),
        (["--method", "rk45"], "fastdiff.run_adaptive"),
        (["--steps", "0"], "got 0"),
        (["--steps", "many"], "--steps"),
        (["--schedule", "cos"], "--schedule"),
        (["--prediction", "w"], "got 'w'"),
        (["--schedule", "flow", "--prediction", "v"], "'v' does not fit"),
        (["--method", "flow_euler", "--schedule", "cosine"], "needs a flow schedule"),
        (["--option", "eta"], "NAME=VALUE"),
        (["--option", "etta=1"], "'etta=1'"),
        (["--option", "clip=-1"], "got -1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_end_with_one_line(capsys, arguments, words):
    status, out, err = run(capsys, "plan", *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("fastdiff: error: ")
    assert err.count("\n") == 1
    assert words in err


def test_methods_tell_adaptive_ones_apart(capsys):
    _, out, _ = run(capsys, "methods")
    fixed, _, own = out.partition("Methods that choose their own steps")
    for name in samplers.ADAPTIVE:
        assert f"\n{name} " not in fixed
        assert f"\n{name} " in own
    lines = fixed.splitlines()
    assert lines[0].split()[:5] == ["METHOD", "ORDER", "CALLS", "NOISE", "HISTORY"]
    rows = {line.split()[0]: line.split()[1:5] for line in lines[1:] if line and not line.startswith(" ")}
    for name, info in samplers.methods().items():
        noise = "yes" if info.stochastic else "no"
        assert rows[name] == [str(info.order), str(info.evaluations_per_step), noise, str(info.history)]
    assert max(map(len, fixed.splitlines())) <= methods.WIDTH
    _, out, _ = run(capsys, "methods", "--json")
    assert {method["name"] for method in json.loads(out)["adaptive"]} == set(samplers.ADAPTIVE)


def test_the_committed_page_is_the_registry(capsys):
    _, out, _ = run(capsys, "methods", "--markdown")
    written = README.read_text(encoding="utf-8")
    assert written == out, "make it anew: fastdiff methods --markdown > fastdiff/samplers/README.md"
    for info in samplers.methods().values():
        noise = "yes" if info.stochastic else "no"
        row = f"| `{info.name}` | {info.order} | {info.evaluations_per_step} | {noise} | {info.history} |"
        assert row in written
