"""Every Triton kernel compiled ahead of time for sm_80, sm_90 and sm_100: no spills, wide accesses, tensor cores."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
BAD_KERNELS = Path(__file__).with_name("bad_kernels.py")


class Compiler:
    """A process that compiles, and the folder that it writes to."""

    def __init__(self, folder: Path) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["TRITON_CACHE_DIR"] = str(folder / "cache")
        command = [sys.executable, str(ROOT / "tests/aot_compile.py"), str(folder)]
        self.folder = folder
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT, text=True, bufsize=1
        )

    def faults(self, module: str, cases: Sequence[tuple[int, Any]], target: int) -> dict[str, list[str]]:
        """What the compiler or the gate objects to in each of a module's numbered cases."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        found, compiled = {}, {}
        for number, case in cases:
            print(f"{module}:{number}:{target}", file=self.process.stdin)
            report = json.loads(self.process.stdout.readline())
            found[case.name] = [report["error"]] if "error" in report else []
            if report.get("shared", 0) > SHARED_LIMIT[target]:
                found[case.name] += [f"{report['shared']} bytes of shared memory of {SHARED_LIMIT[target]}"]
            if "error" not in report:
                compiled[self.folder / f"{Path(module).stem}.{number}.{target}.cubin"] = case
        for cubin, (kernel,) in read(list(compiled), target).items():
            case = compiled[cubin]
            least = {"wide_loads": case.wide_loads, "wide_stores": case.wide_stores}
            found[case.name] += kernel.faults(target=target, matrix=case.matrix, **least)
        return found


@pytest.fixture(scope="session")
def compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compiler]:
    compiler = Compiler(tmp_path_factory.mktemp("aot"))
    with compiler.process:
        yield compiler
        compiler.process.stdin.close()


def chosen(cases: Sequence[Any], target: int) -> list[tuple[int, Any]]:
    """All cases for sm_90 and those of matrix kernels; else of each kernel and its types the first and the last, which
    are what is usual and what asks the most."""
    kinds: dict[object, list[int]] = {}
    for number, case in enumerate(cases):
        types = frozenset(kind for kind in case.signature.values() if kind.startswith("*"))
        kinds.setdefault((case.kernel, types), []).append(number)
    ends = {number for numbers in kinds.values() for number in (numbers[0], numbers[-1])}
    return [
        (number, case)
        for number, case in enumerate(cases)
        if target in case.targets and (target == 90 or case.matrix or number in ends)
    ]


@pytest.mark.parametrize("target", SHARED_LIMIT, ids=lambda target: f"sm_{target}")
@pytest.mark.parametrize("module", MODULES)
def test_machine_code(compiler: Compiler, module: str, target: int) -> None:
    cases = chosen(import_module(f"fastdiff.kernels.{module}").AOT, target)
    assert cases
    faults = {name: found for name, found in compiler.faults(module, cases, target).items() if found}
    assert not faults, "\n".join(f"{name}: {'; '.join(found)}" for name, found in faults.items())


@pytest.mark.parametrize("module", [path.stem for path in sorted((ROOT / "kernels").glob("[a-z]*.py"))])
def test_every_kernel_has_a_case(module: str) -> None:
    """A kernel is what is launched, `name[grid](...)`; other functions under triton.jit are parts of kernels."""
    loaded = import_module(f"fastdiff.kernels.{module}")
    names = re.findall(r"(\w+)\[.*\]\(", (ROOT / "kernels" / f"{module}.py").read_text())
    launched = {name for name in names if hasattr(getattr(loaded, name, None), "arg_names")}
    cases = getattr(loaded, "AOT", [])
    assert launched == {case.kernel.fn.__name__ for case in cases}
    assert len({case.name for case in cases}) == len(cases), "two cases have one name"


class Bad:
    """A case of bad_kernels.py, or none at its number."""

    wide_loads = wide_stores = 0.5
    matrix = True

    def __init__(self, number: int) -> None:
        self.name = str(number)


def test_the_gate_can_fail(compiler: Compiler) -> None:
    faults = compiler.faults(str(BAD_KERNELS), [(number, Bad(number)) for number in range(4)], 90)
    spilling, scalar, product, missing = faults.values()
    assert spilling[0].startswith("a stack frame of")
    assert [fault.split(" of ")[0] for fault in scalar[:2]] == ["only 0%", "only 0%"]
    assert product == ["no tensor-core instruction of sm_90 (HGMMA or QGMMA)"]
    assert missing[0].startswith("IndexError")
