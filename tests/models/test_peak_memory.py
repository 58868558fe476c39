"""An accelerated network's peak memory: at most the library's own and one copy of the weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from fastdiff.models import packs as packs_module
from fastdiff.models.packs import Packs
from fastdiff.models.prepacked import convolve, takes
from fastdiff.models.rewrites import Rewrites

pytest.importorskip("diffusers")

SCRIPT = Path(__file__).parents[1] / "peak_memory.py"
RESETTABLE = Path("/proc/self/clear_refs")


def peak(kind, dtype):
    run = subprocess.run([sys.executable, SCRIPT, kind, dtype], capture_output=True, text=True, check=True, timeout=300)
    return [int(value) for value in run.stdout.split()]


@pytest.mark.skipif(not RESETTABLE.exists(), reason="the system does not count the peak from a moment on")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_copy_of_the_weights_more_than_the_library(dtype):
    own, weights, _ = peak("eager", dtype)
    ours, _, copies = peak("accelerated", dtype)
    assert 0.9 * weights < copies <= 1.01 * weights
    assert ours <= own + weights


@pytest.fixture
def network(monkeypatch):
    """Three convolutions, whose parameters are all the room that there is, and a map for each."""
    monkeypatch.setattr(packs_module, "_MARGIN", 0)
    torch.manual_seed(0)
    made = nn.Sequential(*(nn.Conv2d(64, 64, 3, padding=1) for _ in range(3))).requires_grad_(False)
    made.rewrites = Rewrites()
    return made, torch.randn(1, 64, 8, 8).contiguous(memory_format=torch.channels_last)


def test_a_layer_that_there_is_no_room_for_runs_on_its_parameters(network):
    layers, x = network
    packs, more = Packs().ready(x, layers.rewrites, layers), nn.Conv2d(64, 64, 1).requires_grad_(False)
    for conv in (*layers, more):
        reference = conv.double()(x.double())
        conv.float()
        torch.testing.assert_close(convolve(conv, x, packs, addend=x).double(), reference + x, rtol=1e-4, atol=1e-5)
    assert [takes((conv,), x, packs) for conv in (*layers, more)] == [True, True, True, False]
    packs.clear()
    assert takes((more,), x, packs)


def test_new_values_take_the_room_of_the_old(network):
    layers, x = network
    packs = Packs().ready(x, layers.rewrites, layers)
    for _ in range(3):
        for conv in layers:
            convolve(conv, x, packs)
        for conv in layers:
            conv.weight.add_(1.0)
        assert all(takes((conv,), x, packs) for conv in layers)
    for index in range(3):
        layers[index].weight = nn.Parameter(torch.zeros(64, 64, 3, 3), requires_grad=False)
        assert takes((layers[index],), x, packs)
        assert torch.equal(convolve(layers[index], x, packs, bias=False), torch.zeros_like(x))


def test_another_dtype_takes_the_room_of_the_first(network):
    layers, x = network
    packs = Packs()
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        layers.to(dtype)
        own = x.to(dtype)
        assert packs.ready(own, layers.rewrites, layers) is packs
        for conv in layers:
            assert takes((conv,), own, packs)
            torch.testing.assert_close(convolve(conv, own, packs), conv(own), rtol=2e-2, atol=2e-2)
        assert len(packs.values()) == len(layers)
