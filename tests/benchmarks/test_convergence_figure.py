"""The figure of convergence: its CSV covers the registry, shows the claimed orders, and is what the code gives."""

import csv
import json

import numpy as np
import pytest

from benchmarks import convergence
from benchmarks.convergence import Curve
from benchmarks.record import RESULTS
from fastdiff import samplers

AGAIN = "make it anew: python -m benchmarks.convergence"
CURVES = convergence.curves()
IDS = [curve.label for curve in CURVES]


@pytest.fixture(scope="module")
def lines() -> dict[str, list[dict[str, str]]]:
    """The committed CSV by the curves' labels."""
    found: dict[str, list[dict[str, str]]] = {}
    with (RESULTS / "convergence.csv").open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            label = Curve(line["method"], json.loads(line["options"]), int(line["order"])).label
            found.setdefault(label, []).append(line)
    return found


def test_the_csv_holds_the_deterministic_methods_and_no_others(lines):
    deterministic = {info.name for info in samplers.methods().values() if not info.stochastic}
    assert deterministic <= set(lines), AGAIN
    assert set(lines) == set(IDS), AGAIN


@pytest.mark.parametrize("curve", CURVES, ids=IDS)
def test_its_slope_is_the_order(lines, curve):
    found = lines[curve.label]
    if not curve.options:
        assert curve.order == samplers.methods()[curve.method].order
    assert [line["order"] for line in found] == [str(curve.order)] * len(convergence.STEPS), AGAIN
    assert float(found[-1]["slope"]) == pytest.approx(curve.order, abs=0.1)


@pytest.mark.parametrize("curve", CURVES, ids=IDS)
def test_the_code_still_gives_its_numbers(lines, curve):
    (line,) = (line for line in lines[curve.label] if line["steps"] == "40")
    calls, error = convergence.error(curve, 40)
    assert calls == int(line["calls"]), AGAIN
    assert error == pytest.approx(float(line["error"]), rel=1e-5), AGAIN


def test_levels_are_even_after_a_short_start():
    ratios = np.array(convergence.levels("vp", 40))
    lengths = -np.diff(np.log(ratios))
    assert ratios[[0, -1]] == pytest.approx([50.0, 0.05])
    assert lengths[3:] == pytest.approx(lengths[-1])
    assert (np.diff(lengths[:4]) > 0).all()


def test_the_picture_is_drawn(tmp_path):
    curve = next(curve for curve in CURVES if curve.method == "heun")
    convergence.plot(convergence.rows(curve), tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 10_000
