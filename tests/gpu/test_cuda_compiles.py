"""CUDA C++ compiled for sm_80 and sm_90a: no spills, no stack frame, wide accesses in the kernels made for speed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cores import CORES
from machine_code import Kernel, read

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc/cuda").glob("*.cu"))
TARGETS = {80: "80", 90: "90a"}

# Kernel and template arguments -> least shares of wide loads and stores. The rest is for odd shapes and addresses.
WIDE = {
    "sampler_step_kernel<1, 0>": (0.5, 0.5),
    "sampler_step_kernel<1, 1>": (0.5, 0.5),
    "add_noise_kernel<1>": (0.5, 0.5),
    "philox_normal_kernel<1>": (0.0, 0.5),  # reads nothing but seeds
    **{f"group_norm_silu_kernel<{t}, 8, {last}>": (0.5, 0.5) for t in "fhb" for last in "01"},
    **{f"group_norm_apply_kernel<{t}, 8, {last}>": (0.5, 0.5) for t in "fhb" for last in "01"},
}
NARROW = {
    "sampler_step_kernel<0, 0>",
    "sampler_step_kernel<0, 1>",
    "add_noise_kernel<0>",
    "add_drawn_noise_kernel",
    "philox_normal_kernel<0>",
    *(f"group_norm_{k}_kernel<{t}, 1, {last}>" for k in ("silu", "apply") for t in "fhb" for last in "01"),
}

SPILLING = """
__global__ void __launch_bounds__(1024, 2) spilling(const float* from, float* to, int n) {
  float values[96];
  for (int i = 0; i < 96; ++i) values[i] = from[i * n + threadIdx.x];
  for (int round = 0; round < n; ++round) {
    for (int i = 0; i < 96; ++i) values[i] = values[i] * values[(i + 1) % 96] + values[(i + 7) % 96];
  }
  for (int i = 0; i < 96; ++i) to[i * n + threadIdx.x] = values[i];
}
__global__ void scalar(const float* from, float* to) { to[2 * threadIdx.x + 1] = from[3 * threadIdx.x] + 1.0f; }
__global__ void wide(const float4* from, float4* to) { to[threadIdx.x] = from[threadIdx.x]; }
"""


def compile_cubin(source: Path, target: int, folder: Path) -> Path:
    """The cubin of a .cu file; fails with nvcc's words, also on a warning."""
    cubin = folder / f"{source.stem}.{target}.cubin"
    arch = TARGETS[target]
    flags = ["-std=c++20", "-O3", "-Werror=all-warnings", "-DFASTDIFF_CUDA=1", f"-I{ROOT / 'csrc'}"]
    flags += ["-D__CUDA_NO_HALF_OPERATORS__", "-D__CUDA_NO_HALF_CONVERSIONS__"]  # as torch compiles extensions
    flags += ["-D__CUDA_NO_HALF2_OPERATORS__", "-D__CUDA_NO_BFLOAT16_CONVERSIONS__", "--expt-relaxed-constexpr"]
    flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-cubin", "-o", str(cubin)]
    result = subprocess.run(["nvcc", *flags, str(source)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return cubin


def short(name: str) -> str:
    """group_norm_silu_kernel<h, 8, 1> of the mangled name, in which a name stands behind its length."""
    for match in re.finditer(r"(?=(\d+)([a-z]\w*))", name):
        word, rest = match[2][: int(match[1])], match[2][int(match[1]) :]
        if word.endswith("_kernel"):
            arguments = re.match(r"I(.*?)EEv", rest)
            found = re.findall(r"L[bi](\d+)E?|(13__nv_bfloat16)|(6__half)|(f)", arguments[1] if arguments else "")
            words = [number or ("b" if bf16 else "h" if half else "f") for number, bf16, half, _ in found]
            return word + (f"<{', '.join(words)}>" if words else "")
    return name


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[int, str], Kernel]:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH; the kernels run on the CPU in test_*_on_cpu.py")
    folder = tmp_path_factory.mktemp("cubins")
    cases = [(source, target) for source in SOURCES for target in TARGETS]
    with ThreadPoolExecutor(min(CORES, len(cases))) as pool:
        cubins = list(pool.map(lambda case: compile_cubin(*case, folder), cases))
    return {
        (target, short(kernel.name)): kernel
        for target in TARGETS
        for kernels in read([cubin for cubin in cubins if cubin.suffixes[0] == f".{target}"], target).values()
        for kernel in kernels
    }


def test_each_kernel_is_named_here(compiled: Mapping[tuple[int, str], Kernel]) -> None:
    expected = {(target, name) for name in {*WIDE, *NARROW} for target in TARGETS}
    assert set(compiled) == expected, set(compiled) ^ expected


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: f"sm_{target}")
def test_no_spills_and_wide_accesses(compiled: Mapping[tuple[int, str], Kernel], target: int) -> None:
    faults = {}
    for (built_for, name), kernel in compiled.items():
        if built_for == target:
            loads, stores = WIDE.get(name, (0.0, 0.0))
            found = kernel.faults(target=target, wide_loads=loads, wide_stores=stores, matrix=False)
            faults.update({name: found} if found else {})
    assert not faults, "\n".join(f"{name}: {'; '.join(found)}" for name, found in faults.items())


def test_the_gate_can_fail(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    cubin = compile_cubin(source, 90, tmp_path)
    (kernels,) = read([cubin], 90).values()
    faults = {
        name: kernel.faults(target=90, wide_loads=0.5, wide_stores=0.5, matrix=name == "wide")
        for kernel in kernels
        for name in ("spilling", "scalar", "wide")
        if name in kernel.name
    }
    assert [fault.split(" of ")[0] for fault in faults["scalar"]] == ["only 0%", "only 0%"]
    assert faults["wide"] == ["no tensor-core instruction of sm_90 (HGMMA or QGMMA)"]
    assert faults["spilling"][0].startswith("a stack frame")
    assert "local memory" in faults["spilling"][1]
