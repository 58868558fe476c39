"""Builds fastdiff._C: C++ for the CPU, compiled once per instruction set, and CUDA C++ where a toolkit is.

FASTDIFF_CUDA         auto (the default): with CUDA if PyTorch has it and a toolkit for it is found; 0: without;
                      1: required.
TORCH_CUDA_ARCH_LIST  PyTorch's own: the architectures to compile for. By default those of the GPUs that are here, and
                      where none is, Ampere and Hopper.
"""

import os
import platform
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension, include_paths

ROOT = Path(__file__).parent
CPU_KERNELS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp"))
BINDINGS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
CUDA_KERNELS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.cu"))
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
# Neither changes a result; without them sqrt and comparisons keep loops from becoming vector code.
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
CXX_FLAGS += ["-g0"]  # Python's own flags ask for debug information: a third of the time of what includes torch
CAPABILITIES = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"],
}
# PyTorch rounds a product before it adds it, so that a step of ours cancels where a step in PyTorch does; its normals
# are equal to the bit only with the roundings that are written.
ROUNDED = ["-ffp-contract=off"]
ROUNDED_KERNELS = ("sampler_step", "add_noise", "torch_normal", "langevin_correct")
if platform.machine() not in ("x86_64", "AMD64"):
    CAPABILITIES = {"DEFAULT": []}


def cuda_missing() -> str | None:
    """Why the CUDA kernels cannot be built here; None if they can."""
    if torch.version.cuda is None:
        return "PyTorch is built without CUDA"
    if CUDA_HOME is None:
        return "no CUDA toolkit is found; CUDA_HOME can say where it is"
    home = Path(CUDA_HOME)
    folders = include_paths(device_type="cuda")
    if not (home / "bin/nvcc").is_file() or not any((Path(f) / "cuda_runtime.h").is_file() for f in folders):
        return f"CUDA_HOME={home} is no CUDA toolkit: expected bin/nvcc and include/cuda_runtime.h in it"
    text = subprocess.run([home / "bin/nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+)", text)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        return f"the toolkit in {home} is for another CUDA than PyTorch's {torch.version.cuda}"
    return None


def with_cuda() -> bool:
    wanted = os.environ.get("FASTDIFF_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FASTDIFF_CUDA={wanted}: expected auto, 0 or 1")
    if wanted == "0":
        return False
    missing = cuda_missing()
    if missing and wanted == "1":
        raise SystemExit(f"FASTDIFF_CUDA=1: {missing}")
    if missing:
        print(f"fastdiff: built without CUDA kernels: {missing}")
    return missing is None


class Build(BuildExtension):
    """Compiles csrc/cpu/*.cpp once for each instruction set; the rest as any extension."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable installation builds in a folder that it throws away; in this one the next build finds its objects.
        self.build_temp = f"build/objects-{sys.implementation.cache_tag}"

    def build_extension(self, extension) -> None:
        extension.extra_objects = []
        rounded = [source for source in CPU_KERNELS if Path(source).stem in ROUNDED_KERNELS]
        fused = [source for source in CPU_KERNELS if source not in rounded]
        for (capability, flags), (sources, more) in product(CAPABILITIES.items(), [(fused, []), (rounded, ROUNDED)]):
            flags = [*CXX_FLAGS, *flags, *more, f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
            extension.extra_objects += self.compiler.compile(
                [str(ROOT / source) for source in sources],
                output_dir=os.path.join(self.build_temp, capability),
                include_dirs=extension.include_dirs,
                extra_postargs={"cxx": flags},
                depends=extension.depends,
            )
        super().build_extension(extension)


def extension():
    define = [("FASTDIFF_X86", "1")] if len(CAPABILITIES) > 1 else []
    options = {
        "include_dirs": [str(ROOT / "csrc")],
        "depends": [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*h")],
        "extra_link_args": ["-fopenmp"],
    }
    if not with_cuda():
        flags = {"cxx": CXX_FLAGS}
        return CppExtension("fastdiff._C", BINDINGS, define_macros=define, extra_compile_args=flags, **options)
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    return CUDAExtension(
        "fastdiff._C",
        [*BINDINGS, *CUDA_KERNELS],
        define_macros=[*define, ("FASTDIFF_CUDA", "1")],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-std=c++20", "-lineinfo"]},
        **options,
    )


setup(license="MIT", ext_modules=[extension()], cmdclass={"build_ext": Build})
