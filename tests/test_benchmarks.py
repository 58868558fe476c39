"""The benchmarks' own mechanics: the gate, the turns, the CSV, and the README's table. No speed is asserted."""

from __future__ import annotations

import argparse
import dataclasses
import math
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cases, gate, measure, operators, plot, record, run, sampling, table
from benchmarks.cases import Case
from benchmarks.work import Contender, Work
from fastdiff import schedules
from fastdiff.models import UNet
from fastdiff.models.loading import Model, save_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests time nothing in earnest, and pass on a machine without rest."""
    monkeypatch.setattr(measure, "_waited", lambda: 0.0)


QUICK = cases.select(None, quick=True)
COMMITTED = sorted(record.RESULTS.glob("20*.csv"))


def bench(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    return run.main(parser.parse_args(["--threads", "1", "--seconds", "0.001", *arguments]))


def small(result: torch.Tensor) -> Work:
    """One plus one, by a peer that is right and by us with `result`."""
    truth = torch.full((4,), 2.0, dtype=torch.float64)
    right = truth.float()
    peers = {"pytorch": lambda: right}
    return Work(peers, lambda: result, truth, right, traffic=32, backends=("native", "reference"))


@pytest.mark.parametrize("case", QUICK, ids=lambda case: case.name)
def test_every_contender_is_right(case: Case) -> None:
    work = operators.BUILDERS[case.operator](case, CPU)
    with torch.inference_mode():
        admitted, _, red = run._admitted(case, work, CPU)
    assert red == 0
    assert {next(iter(work.peers)), "fastdiff native", "fastdiff reference"} <= {one.name for one in admitted}


@pytest.mark.parametrize("loop", cases.LOOPS)
def test_the_three_loops_draw_the_same_images(loop: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False}
    blocks = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    network = UNet(in_channels=1, out_channels=1, sample_size=8, num_class_embeds=4, **config, **blocks)
    model = Model(network, schedules.cosine(1000), "v", (1, 8, 8), num_classes=3)
    save_model(model, tmp_path / "tiny.safetensors")
    monkeypatch.setattr(sampling, "MODEL", tmp_path / "tiny.safetensors")
    case = Case("sampling", loop.partition("-")[0] + "-4", (2, 1, 8, 8))
    with torch.inference_mode():
        work = sampling.build(case, CPU)
        admitted, _, red = run._admitted(case, work, CPU)
    assert red == 0
    names = {"pytorch", "diffusers", "fastdiff automatic", "fastdiff native", "fastdiff reference"}
    assert {one.name for one in admitted} == names
    assert work.flops > 0


def test_a_wrong_result_gets_no_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "_chosen", lambda *_: "native")
    for result, names, red in (
        (torch.full((4,), 2.0), {"pytorch", "fastdiff native", "fastdiff reference"}, 0),
        (torch.full((4,), 2.001), set(), 2),
        (torch.full((3,), 2.0), set(), 2),
        (torch.full((4,), float("nan")), set(), 2),
    ):
        monkeypatch.setitem(operators.BUILDERS, "add_noise", lambda *_, result=result: small(result))
        rows, wrong = run.run_case(Case("add_noise", "x", (4,)), CPU, seconds=0.0, facts={})
        assert ({row["contender"] for row in rows}, wrong) == (names, red)
    assert "wrong, not measured" in capsys.readouterr().err


def test_a_peer_that_does_other_work_is_refused() -> None:
    work = dataclasses.replace(small(torch.full((4,), 2.0)), peers={"pytorch": lambda: torch.full((4,), 2.1)})
    peer = work.contenders()[0]
    assert gate.check(peer, work, "float32")[1] is not None
    assert gate.check(peer, dataclasses.replace(work, comparable=False), "float32") == (None, None)


def test_contenders_take_turns() -> None:
    order: list[str] = []

    def named(name: str) -> Contender:
        def call() -> torch.Tensor:
            order.append(name)
            torch.zeros(200_000).sum()
            return torch.zeros(())

        return Contender(name, call)

    timings = measure.interleave([named("a"), named("b")], CPU, seconds=0.01)
    turns = [name for index, name in enumerate(order) if index == 0 or order[index - 1] != name]
    assert len(turns) >= 6
    for timing in timings.values():
        assert timing.rounds >= 3
        assert 0 < timing.p20 <= timing.p50 <= timing.p80


def test_disturbed_turns_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other turn waits for a processor; a contender that always waits is left out."""
    clock = iter(range(10**6))
    call = Contender("a", lambda: torch.zeros(200_000).sum())
    monkeypatch.setattr(measure, "_waited", lambda: float(next(clock) // 3))
    timing = measure.interleave([call], CPU, seconds=0.01)["a"]
    assert timing.rounds >= measure.LEAST_SAMPLES
    assert 0.2 < timing.disturbed < 0.8
    monkeypatch.setattr(measure, "_waited", lambda: float(next(clock)))
    assert measure.interleave([call], CPU, seconds=0.01) == {}


def test_waiting_for_one_s_own_threads_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every turn waits for a processor. Whether other programs had it is known where turns are long enough."""
    clock = count()
    call = Contender("a", lambda: torch.zeros(200_000).sum())
    monkeypatch.setattr(measure, "_waited", lambda: float(next(clock)))
    monkeypatch.setattr(measure, "REST", 0.0)
    monkeypatch.setattr(measure, "others", lambda: 0.0)
    assert measure.interleave([call], CPU, seconds=0.01) == {}, "turns are too short to know"
    monkeypatch.setattr(measure, "SURE", 0.02)
    timing = measure.interleave([call], CPU, seconds=0.01)["a"]
    assert timing.rounds >= measure.LEAST_SAMPLES
    assert timing.disturbed == 0.0
    for used in (lambda: float(next(clock)), lambda: float("nan")):
        monkeypatch.setattr(measure, "others", used)
        assert measure.interleave([call], CPU, seconds=0.01) == {}


def test_what_other_programs_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processors, 10 s each since the start, of which 4 s were idle and 3 s our own."""
    (tmp_path / "stat").write_text("cpu  9 0 9 350 50 0 0 0\ncpu0 1\ncpu1 1\nintr 5\n", encoding="utf-8")
    monkeypatch.setattr(measure, "STAT", tmp_path / "stat")
    monkeypatch.setattr(measure, "TICK", 0.01)
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: 10.0, process_time=lambda: 3.0))
    assert measure.others() == pytest.approx(13.0)
    monkeypatch.setattr(measure, "STAT", tmp_path / "none")
    assert math.isnan(measure.others())


def test_run_writes_merges_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results.csv"
    assert bench("--filter", "philox_normal", "--quick", "--out", str(out)) == 0
    assert bench("--filter", "add_noise/given", "--quick", "--out", str(out), "--compare", str(out)) == 0
    rows = record.read(out)
    assert list(rows[0]) == list(record.COLUMNS)
    assert [row["operator"] for row in rows] == sorted(row["operator"] for row in rows)
    for row in rows:
        assert float(row["p50_us"]) > 0
        assert row["hardware"]
        assert row["torch"] == torch.__version__
    assert {"yes", "no"} == {row["chosen"] for row in rows}
    assert "us ->" in capsys.readouterr().out
    plot.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_merging_replaces_cases_and_keeps_their_order() -> None:
    old = [{"case": "b", "contender": "x", "p50_us": "1"}, {"case": "a", "contender": "x", "p50_us": "2"}]
    new = [{"case": "b", "contender": "x", "p50_us": "3"}]
    merged = record.merge(old, new, ["a", "b"])
    assert [(row["case"], row["p50_us"]) for row in merged] == [("a", "2"), ("b", "3")]
    assert record.compare(old, new)[0].endswith("0.33x")


@pytest.mark.parametrize("arguments", [("--filter", "nothing"), ("--device", "tpu"), ("--compare", "no.csv")], ids=str)
def test_bad_arguments(arguments: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=arguments[1]):
        bench(*arguments)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.name)
def test_committed_results_are_whole(path: Path) -> None:
    rows = record.read(path)
    assert list(rows[0]) == list(record.COLUMNS)
    for row in rows:
        assert row["commit"] not in ("", "unknown")
        assert all(row[name] for name in ("p20_us", "p50_us", "p80_us", "hardware", "torch", "python")), row["case"]


def test_the_readme_shows_the_committed_table() -> None:
    readme = (record.ROOT / "README.md").read_text(encoding="utf-8")
    marked = table.MARKED.search(readme)
    assert marked is not None
    path = record.ROOT / marked[1]
    assert path in COMMITTED
    assert table.update(readme, path) == readme, "make it anew: python -m benchmarks.table --readme"


def test_the_readme_s_results_hold_every_case() -> None:
    marked = table.MARKED.search((record.ROOT / "README.md").read_text(encoding="utf-8"))
    assert marked is not None
    measured = {row["case"] for row in record.read(record.ROOT / marked[1])}
    assert {case.name for case in cases.CASES if not case.extra} <= measured
