"""Every Triton kernel compiled ahead of time for sm_80, sm_90 and sm_100: no spills, wide accesses, tensor cores."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from aot_compile import SHARED_LIMIT
from machine_code import read

ROOT = Path(__file__).parents[2]
MODULES = [
    path.stem for path in sorted((ROOT / "kernels").glob("*.py")) if path.stem != "aot" and "AOT" in path.read_text()
]
CASES = {
    f"{module}-{case.name}-sm_{target}": (f"{module}:{number}:{target}", case, target)
    for module in MODULES
    for number, case in enumerate(import_module(f"fastdiff.kernels.{module}").AOT)
    for target in case.targets
}
BAD_KERNELS = Path(__file__).with_name("bad_kernels.py")


def compile_all(jobs: list[str], folder: Path) -> None:
    """Runs aot_compile.py on the jobs, in as many processes as there are cores, at most 8."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    processes = min(len(os.sched_getaffinity(0)), 8)
    script = str(ROOT / "tests/aot_compile.py")

    def run(part: list[str]) -> None:
        command = [sys.executable, script, str(folder), *part]
        result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr

    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(run, filter(None, (jobs[start::processes] for start in range(processes)))))


def faults(job: str, case: Any, target: int, folder: Path) -> list[str]:
    """What the gate objects to in a compiled case."""
    module, number, _ = job.rsplit(":", 2)
    name = f"{Path(module).stem}.{number}.{target}"
    report = json.loads((folder / f"{name}.json").read_text())
    if "error" in report:
        return [report["error"]]
    (kernel,) = read(folder / f"{name}.cubin")
    found = kernel.faults(target=target, wide_loads=case.wide_loads, wide_stores=case.wide_stores, matrix=case.matrix)
    if report["shared"] > SHARED_LIMIT[target]:
        found.append(f"{report['shared']} bytes of shared memory, more than the {SHARED_LIMIT[target]} of a block")
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[str]]:
    """The faults of each case."""
    folder = tmp_path_factory.mktemp("aot")
    compile_all([job for job, _, _ in CASES.values()], folder)
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 8)) as pool:
        return dict(zip(CASES, pool.map(lambda entry: faults(*entry, folder), CASES.values()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_machine_code(found: Mapping[str, list[str]], name: str) -> None:
    assert not found[name], "; ".join(found[name])


@pytest.mark.parametrize("module", [path.stem for path in sorted((ROOT / "kernels").glob("[a-z]*.py"))])
def test_every_kernel_has_a_case(module: str) -> None:
    """A kernel is what is launched, `name[grid](...)`; other functions under triton.jit are parts of kernels."""
    loaded = import_module(f"fastdiff.kernels.{module}")
    names = re.findall(r"(\w+)\[.*\]\(", (ROOT / "kernels" / f"{module}.py").read_text())
    launched = {name for name in names if hasattr(getattr(loaded, name, None), "arg_names")}
    cases = getattr(loaded, "AOT", [])
    assert launched == {case.kernel.fn.__name__ for case in cases}
    assert len({case.name for case in cases}) == len(cases), "two cases have one name"


def test_the_gate_can_fail(tmp_path: Path) -> None:
    jobs = [f"{BAD_KERNELS}:{number}:90" for number in range(4)]
    compile_all(jobs, tmp_path)

    class Gate:
        wide_loads = wide_stores = 0.5
        matrix = True

    spilling, scalar, product, missing = (faults(job, Gate, 90, tmp_path) for job in jobs)
    assert spilling[0].startswith("a stack frame of")
    assert [fault.split(" of ")[0] for fault in scalar[:2]] == ["only 0%", "only 0%"]
    assert product == ["no tensor-core instruction of sm_90 (HGMMA or QGMMA)"]
    assert missing[0].startswith("IndexError")
