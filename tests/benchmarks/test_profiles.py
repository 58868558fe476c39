"""Per-layer profiles in every state, on an idle machine only."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest
import torch

from benchmarks import cases, measure, profiles
from fastdiff import profiling
from fastdiff.profiling.networks import Layout

THREADS = str(torch.get_num_threads())


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {**profiling.NETWORKS["cifar"].config, "block_out_channels": (32,) * 4}
    monkeypatch.setitem(profiling.NETWORKS, "cifar", Layout("UNet2DModel", small, (4, 3, 32, 32)))
    monkeypatch.setattr(profiles, "CASES", tuple(("cifar", (1, 3, 16, 16), dtype) for dtype in cases.DTYPES))
    monkeypatch.setattr(measure, "others", lambda: 0.0)


def lines(folder: Path) -> list[profiling.table.Line]:
    return profiling.table.read(folder / "profiles.csv")


def test_every_state_has_its_layers(tmp_path: Path) -> None:
    assert profiles.main(["--threads", THREADS, "--filter", "float32"], tmp_path) == 0
    found = lines(tmp_path)
    assert list(dict.fromkeys((each["dtype"], each["code"]) for each in found)) == [
        ("float32", code) for code in profiles.STATES
    ]
    assert all(float(each["peak_gflops_per_second"]) > 0 for each in found)
    picture = (tmp_path / "profiles.png").stat()
    assert profiles.main(["--threads", THREADS, "--filter", "cifar/bfloat16"], tmp_path) == 0
    assert [each for each in lines(tmp_path) if each["dtype"] == "float32"] == found
    assert {each["code"] for each in lines(tmp_path) if each["dtype"] == "bfloat16"} == set(profiles.STATES)
    assert (tmp_path / "profiles.png").stat().st_size > picture.st_size
    (tmp_path / "profiles.png").unlink()
    assert profiles.main(["--draw"], tmp_path) == 0
    assert (tmp_path / "profiles.png").stat().st_size > 1000


def test_what_is_disturbed_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--threads", THREADS, "--filter", "float32"]
    profiles.main(arguments, tmp_path)
    before, clock = lines(tmp_path), count()
    # The second state is disturbed each time, the third once.
    busy = {*range(2, 8), 8, 9}
    monkeypatch.setattr(measure, "others", lambda: 1e9 * at if (at := next(clock)) in busy else 0.0)
    capsys.readouterr()
    assert profiles.main(arguments, tmp_path) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.endswith("the machine was too busy") for line in said] == [False, True, False]
    after = lines(tmp_path)
    codes = [*profiles.STATES]

    def of(found: list[profiling.table.Line], code: str) -> list[profiling.table.Line]:
        return [line for line in found if line["code"] == code]

    assert of(after, codes[1]) == of(before, codes[1])
    assert of(after, codes[0]) != of(before, codes[0])
    assert of(after, codes[2]) != of(before, codes[2])


def test_the_states_differ_in_what_they_call() -> None:
    step = profiling.find("cifar", batch=1, size=16)
    found = {}
    for code, rewrites in profiles.STATES.items():
        profile = profiles.undisturbed(step, rewrites, torch.float32)
        assert profile is not None
        found[code] = {row.operator for row in profile.rows}
    theirs, before, ours = found.values()
    assert "group_norm" in theirs
    assert "group_norm_silu" in before & ours
    assert step.network.rewrites == profiles.Rewrites()
