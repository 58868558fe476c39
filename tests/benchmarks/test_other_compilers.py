"""Networks against OpenVINO and torch.compile, in a process of their own, and layer by layer: the mechanics."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import accelerated, cases, compilers, fresh, measure, record, run, table
from benchmarks.cases import Case
from benchmarks.work import Contender, FirstTimed

CPU = torch.device("cpu")
UNDISTURBED = fresh._undisturbed
TINY = (2, 3, 8, 8)
FACTS = {"dtype": "float32", "device": "cpu", "hardware": "x", "threads": "1"}


@pytest.fixture(autouse=True)
def _undisturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_waited", lambda: 0.0)
    monkeypatch.setattr(fresh, "_undisturbed", lambda *_: True)


def rows(case: Case) -> dict[str, dict[str, str]]:
    found, red = run.run_case(case, CPU, seconds=0.0, facts=record.environment(CPU))
    assert red == 0
    return {row["contender"]: row for row in found}


@pytest.mark.parametrize(
    ("network", "shape", "dtype"),
    [
        ("tiny_unet", TINY, "float32"),
        ("small_unet", (2, 4, 8, 8), "bfloat16"),
        ("small_decoder", (1, 4, 8, 8), "float32"),
    ],
)
def test_openvino_computes_the_network(network: str, shape: tuple[int, ...], dtype: str) -> None:
    pytest.importorskip("openvino")
    found = accelerated._in_openvino(network, shape, getattr(torch, dtype))
    with torch.no_grad():
        truth, _ = accelerated._truth(network, shape)
        first, again = found().clone(), found()
    error = ((first.double() - truth).norm() / truth.norm()).item()
    assert error < {"float32": 1e-5, "bfloat16": 5e-2}[dtype]
    assert (error > 1e-4) == (dtype == "bfloat16"), "it is told what to compute in"
    torch.testing.assert_close(first, again)


def test_without_openvino_a_network_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "find_spec", lambda _: None)
    found = rows(Case("network", "tiny_unet", TINY))
    assert set(found) == {"diffusers", "diffusers channels-last", "fastdiff automatic"}
    assert found["fastdiff automatic"]["chosen"] == "yes"


@pytest.mark.parametrize(
    ("network", "shape", "frozen"),
    [("tiny_unet", TINY, ()), ("small_decoder", (1, 4, 8, 8), (("small_decoder", "float32"),))],
)
def test_compiled_networks_are_rows_with_their_first_call(
    network: str, shape: tuple[int, ...], frozen: tuple[tuple[str, str], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that takes no minute; what is timed is the compiled network, not the one in its place."""
    compiled: list[str] = []

    def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(str(graph))
        return graph.forward

    monkeypatch.setattr(compilers, "BACKEND", compiler)
    monkeypatch.setattr(cases, "FROZEN", frozen)
    found = rows(Case("compiled", network, shape))
    assert set(found) == {"torch.compile", *(["torch.compile frozen"] * len(frozen)), "fastdiff automatic"}
    assert compiled
    assert all(float(row["first_call_s"]) > 0 for row in found.values())
    row = found["torch.compile"]
    assert float(row["first_call_s"]) > float(row["p50_us"]) * 1e-6 > 0
    lines = table.markdown([*found.values()]).splitlines()
    assert lines[-1].startswith(f"| `{network}` | ")
    assert lines[-1].count(" s |") == 2 + len(frozen)


def test_a_first_call_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([10.0, 12.5])
    monkeypatch.setattr("benchmarks.work.time.perf_counter", lambda: next(ticks))
    call = FirstTimed(lambda: torch.ones(2))
    contender = Contender("x", call)
    assert contender.first is None
    assert call().sum() == call().sum() == 2
    assert contender.first == 2.5
    assert Contender("x", lambda: torch.ones(1)).first is None


def test_a_network_in_a_process_of_its_own() -> None:
    """The whole way, in new processes: ours has at most a copy of the weights more than diffusers', and some slack for
    what its first call loads."""
    found = rows(Case("first_call", "small_decoder", (1, 4, 8, 8)))
    assert set(found) == {"diffusers", "fastdiff automatic"}
    weights = float(found["diffusers"]["weight_mbytes"])
    decoder = accelerated._network("small_decoder").decoder
    assert weights == pytest.approx(sum(p.numel() for p in decoder.parameters()) * 4e-6, rel=1e-3)
    for row in found.values():
        assert float(row["peak_mbytes"]) > weights
        assert 0 < float(row["first_call_s"]) == pytest.approx(float(row["p50_us"]) * 1e-6, rel=1e-3)


def test_peak_memory_counts_what_was_freed() -> None:
    before = fresh.resident("VmHWM")
    torch.ones(2 * before // 4 // 2 + 2**26).sum()
    assert fresh.resident("VmHWM") - before > 2**27
    assert fresh.resident() < fresh.resident("VmHWM")


def test_a_process_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho first >&2\necho no memory >&2\nexit 1\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert run.run_case(Case("first_call", "tiny_unet", TINY), CPU, seconds=0.0, facts={}) == ([], 1)
    said = "first_call/tiny_unet/2x3x8x8/float32: diffusers: not measured: exit status 1, it says: no memory\n"
    assert capsys.readouterr().err == said


def test_a_disturbed_first_call_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    program, found = tmp_path / "python", {"first": 1.0, "others": 0.5, "peak": 3.0, "weights": 2.0}
    program.write_text(f"#!/bin/sh\necho '{json.dumps(found)}'\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(fresh, "_undisturbed", UNDISTURBED)
    case = Case("first_call", "tiny_unet", TINY)
    assert run.run_case(case, CPU, seconds=0.0, facts={}) == ([], 1)
    assert capsys.readouterr().err.endswith("not measured: the machine was too busy\n")
    quiet = iter([False, False, True])
    monkeypatch.setattr(fresh, "_undisturbed", lambda *_: next(quiet))
    assert fresh.measure(case, fresh.OURS, threads=1) == {"first": 1.0, "peak": 3.0, "weights": 2.0}
    assert UNDISTURBED(0.03, 1.0)
    assert not UNDISTURBED(float("nan"), 1.0)


def test_too_much_memory_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    peaks = {fresh.LIBRARY: 5e9, fresh.OURS: 6.5e9}
    monkeypatch.setattr(fresh, "measure", lambda _, name, **__: {"first": 1.0, "peak": peaks[name], "weights": 1e9})
    case = Case("first_call", "tiny_unet", TINY)
    found, red = run.run_case(case, CPU, seconds=0.0, facts={})
    assert (len(found), red) == (2, 1)
    assert "1.50 copies of the weights" in capsys.readouterr().err
    peaks[fresh.OURS] = 5e9 + 1e9 + fresh.SLACK
    assert run.run_case(case, CPU, seconds=0.0, facts={})[1] == 0


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_every_network_is_called_in_a_process_of_its_own(dtype: str) -> None:
    measured = [
        (each.variant, each.shape) for each in cases.CASES if (each.operator, each.dtype) == ("first_call", dtype)
    ]
    assert measured == [*cases.NETWORKS]


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_made_up_weights_give_finite_numbers(dtype: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["fresh", "tiny_unet", "1x3x8x8", dtype, fresh.OURS, str(torch.get_num_threads())])
    seen: list[torch.Tensor] = []
    accelerate = fresh.fastdiff.accelerate

    def watched(network: Any) -> None:
        accelerate(network)
        network.register_forward_hook(lambda *call: seen.append(call[-1][0]))

    monkeypatch.setattr(fresh.fastdiff, "accelerate", watched)
    fresh.main()
    assert json.loads(capsys.readouterr().out).keys() == {"first", "others", "peak", "weights"}
    assert len(seen) == fresh.CALLS
    assert seen[0].isfinite().all()
    assert seen[0].dtype == getattr(torch, dtype)


def test_a_large_network_is_not_copied_for_another_memory_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilers, "has_openvino", lambda: False)
    monkeypatch.setattr(accelerated, "LARGE", 1000)
    with torch.no_grad():
        assert set(accelerated.build(Case("network", "tiny_unet", TINY), CPU).peers) == {"diffusers"}


def test_compilations_are_measured_where_they_are_asked_for() -> None:
    usual = cases.select(None, quick=False)
    assert {(case.variant, case.shape) for case in usual if case.operator == "compiled"} == set()
    named = cases.select("compiled/", quick=False)
    assert {(case.variant, case.shape) for case in named} == set(cases.NETWORKS)
    assert all(case.operator != "compiled" for case in cases.select("cifar/16", quick=False))


def line(contender: str, microseconds: float, **more: str) -> dict[str, str]:
    chosen = "yes" if contender.startswith("fastdiff") else "no"
    return {**FACTS, "contender": contender, "chosen": chosen, "p50_us": str(microseconds), **more}


def test_tables_of_compilers_and_memory() -> None:
    net = {
        "operator": "network",
        "variant": "n",
        "shape": "1",
        "case": "network/n",
        "roofline_share": "",
        "speedup": "2",
    }
    of_network = [
        line("diffusers", 4e3, relative_error="2e-2", **net),
        line("diffusers float32", 9e3, relative_error="1e-6", **net),
        line("openvino", 3e3, relative_error="3e-2", **net),
        line("fastdiff automatic", 2e3, relative_error="1e-2", **net),
    ]
    of_network = [row | {"dtype": "bfloat16"} for row in of_network]
    one = {"operator": "compiled", "variant": "n", "shape": "1", "case": "compiled/n"}
    of_compiled = [
        line("torch.compile", 5e3, first_call_s="61.2", **one),
        line("torch.compile frozen", 4e3, first_call_s="52", **one),
        line("fastdiff automatic", 1.6e3, first_call_s="0.25", **one),
    ]
    two = {"operator": "first_call", "variant": "n", "shape": "1", "case": "c", "weight_mbytes": "100"}
    of_first = [
        line("diffusers", 5e5, peak_mbytes="250", **two),
        line("fastdiff automatic", 6e5, peak_mbytes="325", **two),
    ]
    text = table.markdown([*of_network, *of_compiled, *of_first])
    assert "| `n` | 1 | bfloat16 | 4 ms |  | 4 ms | 3 ms | 2 ms | 2.00 | 4.50 | 2.50 | 1.50 | 1e-2 (2e-2) |  |" in text
    assert "| `n` | 1 | float32 | 5 ms | 4 ms | 1.6 ms | 2.50 | 61.2 s | 52 s | 0.25 s |" in text
    assert "| `n` | 1 | float32 | 500 ms | 600 ms | 250 MB | 325 MB | 100 MB | 0.75 |" in text
    assert "|  | 3 ms | 2 ms | 2.00 | 4.50 |  | 1.50 |" in table.markdown(of_network), "where nothing was compiled"
    assert "|  | 1.6 ms | 3.12 | 61.2 s |  | 0.25 s |" in table.markdown([of_compiled[0], of_compiled[2]])
    of_first[1] |= {"p50_us": "4e6", "peak_mbytes": "360"}
    assert "| 500 ms | **4 s** | 250 MB | 360 MB | 100 MB | **1.10** |" in table.markdown(of_first)
    for head in table.HEADS.values():
        first, second = head.splitlines()
        assert first.count("|") == second.count("|")
