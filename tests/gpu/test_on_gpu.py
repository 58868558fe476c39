"""What only a GPU can show of the CUDA kernels: streams, graphs, large arrays, and compute-sanitizer's verdict.

Their results against the truth are in tests/ops, where a GPU is one more target.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from backends import require_cuda_kernels
from inputs import DTYPES, LAYOUTS
from tolerance import assert_close_to_truth

import fastdiff
from fastdiff import ops
from fastdiff.ops.row import GUIDANCE, NEW_X, ROW_SIZE

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _native() -> Iterator[None]:
    require_cuda_kernels()
    with fastdiff.use_backend("native"):
        yield


def random(*shape: int, mean: float = 0.0) -> torch.Tensor:
    return torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(0)) + mean


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 320, 64, 64), 32), ((2, 960, 64, 64), 32), ((2, 1280, 16, 16), 32), ((1, 256, 512, 512), 32)],
    ids=str,
)
def test_group_norm_of_real_networks(shape: tuple[int, ...], groups: int, dtype: str, layout: str) -> None:
    """One block, a cluster and two kernels, at their real sizes; twice the same bits."""
    x = random(*shape, mean=10.0).to(DTYPES[dtype]).contiguous(memory_format=LAYOUTS[layout])
    weight, bias = random(shape[1]), random(shape[1])
    y, again = (ops.group_norm_silu(x, groups, weight, bias) for _ in range(2))
    assert torch.equal(y, again)
    truth = F.silu(F.group_norm(x.double(), groups, weight.double(), bias.double()))
    plain = F.silu(F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype)))
    assert_close_to_truth(y, truth, plain)


def test_more_than_two_to_the_31_elements() -> None:
    """Offsets are 64-bit; the last sample is that of a small call."""
    seeds = torch.arange(1, 10, device="cuda")
    shape = (9, 2**28)
    noise = ops.philox_normal(seeds, shape, dtype=torch.bfloat16)
    assert torch.equal(noise[-1:], ops.philox_normal(seeds[-1:], (1, 2**28), dtype=torch.bfloat16))
    ones = torch.ones(9, device="cuda")
    assert torch.equal(ops.add_noise(noise, 0 * ones, ones, seeds=seeds)[-1], noise[-1])
    tall = noise.view(9, 4, 2**13, 2**13)
    assert torch.equal(ops.group_norm_silu(tall, 2)[-1:], ops.group_norm_silu(tall[-1:], 2))


def test_the_current_stream() -> None:
    """Work waits for what its stream holds before it: a long fill, then the kernel that reads it."""
    x = torch.zeros(64, 4, 256, 256, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(3.0)
        out = ops.add_noise(x, torch.ones(64, device="cuda"), torch.zeros(64, device="cuda"), noise=x)
    stream.synchronize()
    assert (out == 3.0).all()


def test_a_captured_graph_follows_the_counter() -> None:
    """The row is read from the device at replay, so one graph serves every step."""
    x, m = random(1, 4, 64, 64), random(2, 4, 64, 64)
    table = torch.zeros(3, ROW_SIZE, device="cuda")
    table[:, NEW_X.start] = torch.tensor([1.0, 2.0, 3.0])
    table[:, GUIDANCE] = 1.0
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    ops.sampler_step(x, m, table, 0, counter=counter)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.sampler_step(x, m, table, 0, counter=counter).x
        normed = ops.group_norm_silu(x, 2)
    for index in range(3):
        counter.fill_(index)
        graph.replay()
        assert torch.equal(out, (index + 1) * x)
    assert torch.equal(normed, ops.group_norm_silu(x, 2))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool: str) -> None:
    if shutil.which("compute-sanitizer") is None:
        pytest.skip("compute-sanitizer is not on PATH")
    script = Path(__file__).with_name("sanitized.py")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable, str(script)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "Device not supported" in result.stdout:
        pytest.skip("compute-sanitizer does not support this device or virtual machine")
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
