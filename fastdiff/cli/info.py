"""`fastdiff info`: what is installed, what the machine has, and which backend each operator runs on."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff.errors import BackendError
from fastdiff.ops import dispatch, native

PACKAGES = ("torch", "triton", "numpy", "safetensors", "pillow", "diffusers")
EPILOG = """\
For each operator the first line names the backend that runs it here (float32, an ordinary call); the lines below it say
why each other backend does not. In Python, fastdiff.explain(...) says the same for one call, and fastdiff.report() what
has run.

  native      C++ on the processor, CUDA C++ on an NVIDIA GPU
  triton      Triton kernels on a GPU
  torch       PyTorch's own kernel
  reference   plain PyTorch: slow, and what the others are tested against

examples:
  fastdiff info
  fastdiff info --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Show versions, processor, GPUs, and which code each operator runs on here."
    parser.epilog = EPILOG
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def main(arguments: argparse.Namespace) -> int:
    facts = collect()
    print(json.dumps(facts) if arguments.json else describe(facts))
    return 0


def collect() -> dict[str, Any]:
    """Everything `fastdiff info` says, as plain data."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "fastdiff": fastdiff.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        # PyTorch names its build, as in 2.13.0+cu130, where its package may not.
        "packages": {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__},
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": {"fastdiff": native.capability(), "torch": torch.backends.cpu.get_cpu_capability()},
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "torch_cuda": torch.version.cuda,
        "extension": {"loaded": not isinstance(native.extension(), str), "cuda": native.cuda_built()},
        "device": device,
        "operators": {name: _operator(name, torch.device(device)) for name in dispatch.OPERATORS},
    }


def describe(facts: dict[str, Any]) -> str:
    """The facts as a page of text."""
    capability = facts["cpu_capability"]
    packages = ", ".join(f"{name} {found or 'not installed'}" for name, found in facts["packages"].items())
    lines = [
        f"fastdiff {facts['fastdiff']} on Python {facts['python']}, {facts['system']}",
        f"packages: {packages}",
        f"processor: {facts['processor']}, {facts['cores']} cores, {facts['threads']} threads in use",
        f"instruction set: {capability['fastdiff']} in fastdiff, {capability['torch']} in PyTorch",
        *_gpu_lines(facts),
        f"\noperators on {facts['device']}:",
    ]
    for name, found in facts["operators"].items():
        error = (found["error"] or "").removeprefix(f"{name}: ")
        lines.append(f"  {name}: {found['backend'] or error}")
        lines += [f"    not {backend}: {reason}" for backend, reason in found["not"].items()]
    return "\n".join(lines)


def processor() -> str:
    """The processor's model name."""
    listing = Path("/proc/cpuinfo")
    if listing.is_file():
        for line in listing.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _gpu_lines(facts: dict[str, Any]) -> list[str]:
    built = "with" if facts["extension"]["cuda"] else "without"
    if not facts["gpus"]:
        why = " (this PyTorch is built without CUDA)" if facts["torch_cuda"] is None else ""
        return [f"GPUs: no NVIDIA GPU was found{why}; nothing CUDA is attempted"]
    lines = [
        f"GPU {index}: {gpu['name']}, {gpu['memory_gib']} GiB, compute capability {gpu['capability']}"
        for index, gpu in enumerate(facts["gpus"])
    ]
    return [*lines, f"CUDA {facts['torch_cuda']} in PyTorch; the extension is built {built} its CUDA kernels"]


def _gpu(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    memory = round(found.total_memory / 2**30, 1)
    return {"name": found.name, "memory_gib": memory, "capability": f"{found.major}.{found.minor}"}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _operator(name: str, device: torch.device) -> dict[str, Any]:
    args = _ordinary_call(name, device)
    backends = dispatch.BACKENDS[name]
    try:
        chosen = dispatch.choose(name, args, record=False).name
        error = None
    except BackendError as refused:
        chosen, error = None, str(refused)
    others = (backend for backend in backends if backend.name != chosen)
    reasons = {b.name: b.unavailable() or b.supports(*args) or "able, but not preferred" for b in others}
    return {"backend": chosen, "error": error, "not": reasons}


def _ordinary_call(name: str, device: torch.device) -> tuple[Any, ...]:
    """Arguments of the operator's schema, as an ordinary call has them; they are looked at, not computed with."""
    x = torch.zeros(1, 32, 8, 8, device=device)
    per_sample = torch.zeros(1, device=device)
    seeds = torch.zeros(1, dtype=torch.int64, device=device)
    weight = torch.zeros(32, device=device)
    calls: dict[str, tuple[Any, ...]] = {
        "sampler_step": (x, x, torch.zeros(1, 32, device=device), 0, *(None,) * 7, False, False, None),
        "add_noise": (x, per_sample, per_sample, None, seeds, 0, 0),
        "philox_normal": (seeds, [1, 32, 8, 8], 0, 0, torch.float32),
        "group_norm_silu": (x, 32, weight, weight, 1e-5, True, None, None, None, False),
        "attention": (x, x, x, None, 1.0),
        "guidance_weights": (torch.cat([x, x]), torch.zeros(1, 2, device=device), 0.7, False, None),
        "dynamic_threshold": (x, x, torch.zeros(1, 32, device=device), 0, None, None, 0.995, 1.0),
        "langevin_step_size": (x, x, torch.zeros(1, 32, device=device), 0, None, None, None, seeds, 0.16),
        "geglu": (x,),
        "layer_norm_modulate": (x, *(None,) * 4, 1e-5, None, None, False),
        "conv_bias_residual": (x, torch.zeros(32, 32, 3, 3, device=device), weight, x, [1, 1], [1, 1]),
        "upsample_conv": (x, torch.zeros(4 * 32, 32, 2, 2, device=device), weight),
    }
    return calls[name]
