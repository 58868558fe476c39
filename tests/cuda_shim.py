"""The CUDA kernels on the CPU: csrc/cuda compiled by g++ against tests/gpu/cuda_shim, with the operators' arguments."""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from cores import CORES
from torch import Tensor

from fastdiff.ops.reference import memory_format

ROOT = Path(__file__).parents[1]
SHIM = ROOT / "tests/gpu/cuda_shim"
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
GUARD = 64
"""Elements around each output that no kernel may write."""


class _Array(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("type", ctypes.c_int))


def build(folder: Path) -> Path:
    """The shared library with every CUDA kernel; raises with the compiler's words."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = ["-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    flags += ["-DFASTDIFF_CUDA=1", f"-I{SHIM}", f"-I{ROOT / 'csrc'}", "-x", "c++", "-c"]

    def compile_one(source: Path) -> str:
        target = folder / f"{source.name}.o"
        result = subprocess.run(
            [*compiler, *flags, str(source), "-o", str(target)], capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
        return str(target)

    with ThreadPoolExecutor(CORES) as pool:
        objects = list(pool.map(compile_one, [*sorted((ROOT / "csrc/cuda").glob("*.cu")), *SHIM.glob("*.cpp")]))
    library = folder / "libcuda_shim.so"
    subprocess.run([*compiler, "-shared", "-o", str(library), *objects], check=True)
    return library


class Launchers:
    """fastdiff._C's functions with the CUDA kernels behind them; tensors are on the CPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.shim_group_norm_silu_workspace.restype = ctypes.c_int64
        self._outputs: list[tuple[Tensor, int]] = []
        self.device()

    def device(
        self,
        order: str = "forward",
        *,
        major: int = 9,
        multiprocessors: int = 132,
        barriers: bool = True,
        cluster_barriers: bool = True,
    ) -> None:
        """The device to play: the order of its threads, its architecture, and which barriers to leave out."""
        self._library.shim_set(ORDERS[order], major, multiprocessors, barriers, cluster_barriers)

    def philox_normal(self, seeds: Tensor, shape: list[int], step: int, stream: int, dtype: torch.dtype) -> Tensor:
        out = self._output(torch.empty(shape, dtype=dtype, device="meta"))
        sizes = [shape[0], out.numel() // shape[0], 1, step, stream]
        self._call("shim_noise", sizes, [None, None, out], None, None, _pointer(seeds))
        return out

    def add_noise(
        self,
        x: Tensor,
        alpha: Tensor,
        sigma: Tensor,
        noise: Tensor | None,
        seeds: Tensor | None,
        step: int,
        stream: int,
    ) -> Tensor:
        out = self._output(x)
        sizes = [x.shape[0], x[0].numel(), 1 if x.is_contiguous() else x.shape[1], step, stream]
        self._call("shim_noise", sizes, [x, noise, out], _pointer(alpha), _pointer(sigma), _pointer(seeds))
        return out

    def group_norm_silu(
        self,
        x: Tensor,
        groups: int,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        silu: bool,
        addend: Tensor | None,
        residual: Tensor | None,
        second: Tensor | None,
        return_sum: bool,
    ) -> tuple[Tensor, Tensor]:
        layout = memory_format(x, second)
        like = torch.empty_like(x if second is None else torch.cat([x, second], dim=1), memory_format=layout)
        y, h = self._output(like), self._output(like) if return_sum else None
        samples, channels = like.shape[:2]
        sizes = [samples, channels, x[0, 0].numel(), groups, layout != torch.contiguous_format, silu, x.shape[1]]
        tensors = [x, weight, bias, addend, residual, y, h, second]
        needed = self._library.shim_group_norm_silu_workspace(_integers(sizes), _arrays(tensors))
        workspace = self._output(torch.empty(needed // 4, device="meta"))
        self._call("shim_group_norm_silu", sizes, tensors, ctypes.c_float(eps), _pointer(workspace))
        return y, x.new_empty(0) if h is None else h

    def sampler_step(
        self,
        x: Tensor,
        model_output: Tensor,
        table: Tensor,
        row: int,
        counter: Tensor | None,
        anchor: Tensor | None,
        hist1: Tensor | None,
        hist2: Tensor | None,
        hist3: Tensor | None,
        noise: Tensor | None,
        seeds: Tensor | None,
        weights: Tensor | None,
        scales: Tensor | None,
        known: Tensor | None,
        known_noise: Tensor | None,
        mask: Tensor | None,
        new_history: bool,
        new_anchor: bool,
        copies: int | None,
        model_input: torch.dtype | None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        floats = torch.empty(x.shape, device="meta")
        groups = len(model_output) // len(x)
        copies = copies or groups
        inputs = torch.empty(copies * len(x), *x.shape[1:], dtype=model_input, device="meta")
        outputs = (
            self._output(torch.empty(x.shape, dtype=x.dtype, device="meta")),
            self._output(floats) if new_history else None,
            self._output(floats) if new_anchor else None,
            self._output(inputs) if model_input else None,
        )
        inner = 1 if model_output.is_contiguous() else model_output.shape[1]
        period = 1 if mask is None else mask[0].numel()
        stride = period if mask is not None and len(mask) > 1 else 0
        sizes = [len(x), x[0].numel(), groups, model_output[0].numel(), inner, copies, row, len(table), stride, period]
        arrays = [x, model_output, noise, anchor, hist1, hist2, hist3, *outputs, known, known_noise]
        pointers = (_pointer(value) for value in (seeds, table, counter, weights, scales, mask))
        self._call("shim_sampler_step", sizes, arrays, *pointers)
        return outputs

    def _output(self, like: Tensor) -> Tensor:
        """Memory for an output, NaN inside and a known value on both sides."""
        buffer = torch.full((like.numel() + 2 * GUARD,), 7.0, dtype=like.dtype)
        buffer[GUARD : GUARD + like.numel()] = torch.nan
        self._outputs.append((buffer, like.numel()))
        strides = torch.empty_like(like, device="meta", memory_format=memory_format(like)).stride()
        return buffer.as_strided(like.shape, strides, GUARD)

    def _call(self, name: str, sizes: list[int], arrays: list[Tensor | None], *rest: object) -> None:
        error = getattr(self._library, name)(_integers(sizes), _arrays(arrays), *rest)
        assert error == 0, f"{name}: CUDA error {error}"
        for buffer, count in self._outputs:
            outside = torch.cat([buffer[:GUARD], buffer[GUARD + count :]])
            assert (outside == 7.0).all(), f"{name} wrote outside of its output"
        self._outputs.clear()


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _integers(values: list[int]) -> ctypes.Array:
    return (ctypes.c_int64 * len(values))(*map(int, values))


def _arrays(tensors: list[Tensor | None]) -> ctypes.Array:
    empty = _Array(None, 0)
    return (_Array * len(tensors))(*(empty if t is None else _Array(t.data_ptr(), TYPES[t.dtype]) for t in tensors))
