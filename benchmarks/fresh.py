"""A network in a process of its own: how long its first call takes, and the most memory that it ever has.

`python -m benchmarks.fresh NETWORK SHAPE DTYPE CONTENDER THREADS` is that process. The memory is what is resident at
the most, less what is before the network is made: weights, copies of them, and the maps of three calls.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fastdiff
from benchmarks import accelerated
from benchmarks.accelerated import INDEX, NETWORKS, Network
from benchmarks.cases import Case
from benchmarks.measure import DISTURBED, TICK, others
from benchmarks.record import ROOT

LIBRARY, OURS = "diffusers", "fastdiff automatic"
CALLS, TRIES = 3, 3
COPIES, SECONDS = 1.0, 3.0
"""What ours may take: so many copies of the weights beside what diffusers' own does, and so long for the first call."""
SLACK = 2**23
"""Bytes of code that ours loads at its first call, which are no copies."""


def too_much(theirs: Mapping[str, float], ours: Mapping[str, float]) -> str | None:
    """What is wrong with our memory, of two of `measure`."""
    copies = (ours["peak"] - theirs["peak"]) / ours["weights"]
    if ours["peak"] <= theirs["peak"] + COPIES * ours["weights"] + SLACK:
        return None
    return f"it needs {copies:.2f} copies of the weights more than diffusers"


def measure(case: Case, contender: str, *, threads: int) -> dict[str, float]:
    """{"first": seconds, "peak": bytes, "weights": bytes}, from a new process; again where other programs disturbed it.

    Errors: ChildProcessError where the process fails, with the last line of what it says, or is disturbed each time.
    """
    shape = "x".join(map(str, case.shape))
    command = [sys.executable, "-m", "benchmarks.fresh", case.variant, shape, case.dtype, contender, str(threads)]
    for _ in range(TRIES):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or ["nothing"]
            raise ChildProcessError(f"exit status {done.returncode}, it says: {said[-1]}")
        found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        if _undisturbed(found.pop("others"), found["first"]):
            return found
    raise ChildProcessError("the machine was too busy")


def _undisturbed(used: float, seconds: float) -> bool:
    """Whether other programs used next to nothing of the processors; used: their seconds."""
    return used <= DISTURBED * seconds + TICK


def run(name: str, shape: tuple[int, ...], dtype: torch.dtype, contender: str) -> dict[str, float]:
    layout, device = NETWORKS[name], torch.device("cpu")
    kind = _kind(layout)
    before = resident()
    network = _made(kind, layout, dtype)
    x, times, given = accelerated.inputs(layout, shape, dtype, device)
    start, used = time.perf_counter(), others()
    with torch.no_grad():
        if contender == OURS:
            fastdiff.accelerate(network)
        for index in range(CALLS):
            if layout.kind == "AutoencoderKL":
                network.decoder(x)
            else:
                network(x, times[INDEX], return_dict=False, **given)
            if index == 0:
                first, used = time.perf_counter() - start, others() - used
    weights = sum(each.nbytes for each in (network.decoder if hasattr(network, "decoder") else network).parameters())
    return {"first": first, "others": used, "peak": resident("VmHWM") - before, "weights": weights}


def resident(field: str = "VmRSS") -> int:
    """Bytes of this process in memory, now or (VmHWM) at the most so far."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def _kind(layout: Network) -> Any:
    """The library's class, of which a small call has been made, so that what libraries load lies in memory already."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    F.conv2d(torch.ones(1, 8, 8, 8), torch.ones(8, 8, 3, 3))
    return getattr(diffusers, layout.kind)


def _made(kind: Any, layout: Network, dtype: torch.dtype) -> Any:
    """The network of diffusers', with numbers of the usual size in its weights, and nothing made on the way to them."""
    with torch.device("meta"):
        network: nn.Module = kind(**layout.config)
    network.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(2**16, generator=generator).to(dtype)
    for parameter in network.parameters():
        flat, scale = parameter.view(-1), parameter[0].numel() ** -0.5
        for start in range(0, len(flat), len(block)):
            part = flat[start : start + len(block)]
            torch.mul(block[: len(part)], scale, out=part)
    return network


def main() -> None:
    name, shape, dtype, contender, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    sizes = tuple(int(size) for size in shape.split("x"))
    print(json.dumps(run(name, sizes, getattr(torch, dtype), contender)))


if __name__ == "__main__":
    main()
