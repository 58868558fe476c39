"""Builds fastdiff._C: C++ for the CPU, compiled once per instruction set, and CUDA C++ where a toolkit is.

FASTDIFF_CUDA         auto (the default): with CUDA if PyTorch has it and a toolkit is found; 0: without; 1: required.
TORCH_CUDA_ARCH_LIST  PyTorch's own: the architectures to compile for. By default those of the GPUs that are here, and
                      where none is, Ampere and Hopper.
"""

import os
import platform
import sys
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
CPU_KERNELS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cpu").glob("*.cpp"))
CUDA_KERNELS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/cuda").glob("*.cu"))
CXX_FLAGS = ["-O3", "-std=c++20", "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]
# Neither changes a result; without them sqrt and comparisons keep loops from becoming vector code.
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
CAPABILITIES = {
    "DEFAULT": [],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"],
}
if platform.machine() not in ("x86_64", "AMD64"):
    CAPABILITIES = {"DEFAULT": []}


def with_cuda() -> bool:
    wanted = os.environ.get("FASTDIFF_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"FASTDIFF_CUDA={wanted}: expected auto, 0 or 1")
    possible = CUDA_HOME is not None and torch.version.cuda is not None
    if wanted == "1" and not possible:
        raise SystemExit("FASTDIFF_CUDA=1: expected a CUDA toolkit and a CUDA build of PyTorch; found not both")
    return possible and wanted != "0"


class Build(BuildExtension):
    """Compiles csrc/cpu/*.cpp once for each instruction set; the rest as any extension."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # An editable installation builds in a folder that it throws away; in this one the next build finds its objects.
        self.build_temp = f"build/objects-{sys.implementation.cache_tag}"

    def build_extension(self, extension) -> None:
        extension.extra_objects = []
        for capability, flags in CAPABILITIES.items():
            flags = [*CXX_FLAGS, *flags, f"-DCPU_CAPABILITY={capability}", f"-DCPU_CAPABILITY_{capability}"]
            extension.extra_objects += self.compiler.compile(
                [str(ROOT / source) for source in CPU_KERNELS],
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
        return CppExtension(
            "fastdiff._C", ["csrc/register.cpp"], define_macros=define, extra_compile_args=flags, **options
        )
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    return CUDAExtension(
        "fastdiff._C",
        ["csrc/register.cpp", *CUDA_KERNELS],
        define_macros=[*define, ("FASTDIFF_CUDA", "1")],
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": ["-O3", "-std=c++20", "-lineinfo"]},
        **options,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": Build})
