"""Compiles Triton kernels without a GPU: `python tests/aot_compile.py FOLDER`, then lines MODULE:CASE:TARGET.

A process of its own, because Triton's interpreter is on in the tests' process and Triton looks for that when a kernel
file is imported; one for all jobs, because imports take seconds. CASE is the number in the module's `AOT`. A job writes
FOLDER/MODULE.CASE.TARGET.cubin, and its answer is a line of JSON: the bytes of shared memory, or the compiler's error.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that a block may have."""


def load(module: str) -> ModuleType:
    """fastdiff.kernels.<module>, or a file's path."""
    if not module.endswith(".py"):
        return importlib.import_module(f"fastdiff.kernels.{module}")
    spec = importlib.util.spec_from_file_location(Path(module).stem, module)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def compile_case(case, target: int) -> tuple[bytes, int]:
    """The cubin of one case, and its bytes of shared memory."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = case.kernel.arg_names
    assert list(case.signature) == list(names), f"signature {list(case.signature)}, expected {list(names)}"
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible}
    source = ASTSource(case.kernel, dict(case.signature), dict(case.constexprs), attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "num_ctas": case.num_ctas}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return compiled.asm["cubin"], compiled.metadata.shared


def answer(job: str, folder: Path) -> dict[str, object]:
    module, number, target = job.rsplit(":", 2)
    try:
        cubin, shared = compile_case(load(module).AOT[int(number)], int(target))
    except Exception as error:  # whatever the compiler raises is the test's result
        return {"error": f"{type(error).__name__}: {error}"}
    (folder / f"{Path(module).stem}.{number}.{target}.cubin").write_bytes(cubin)
    return {"shared": shared}


def main(folder: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a compiler prints is no answer
    for line in sys.stdin:
        print(json.dumps(answer(line.rstrip("\n"), folder)), file=answers, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
